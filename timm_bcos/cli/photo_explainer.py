"""Photos and films explained one after the other: what `timm-bcos explain` does with each."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
from torch import Tensor

from ..data.photos import open_photo
from ..errors import InputError
from ..explanation.api import contrast, explain_targets
from ..explanation.result import Explanation
from ..explanation.video import explain_video
from ..explanation.visualization import save_image
from ..viewer.document import save_viewer
from .outputs import OutputPaths, is_film, slug

__all__ = ["PhotoExplainer"]

MODES = {1: "L", 3: "RGB"}  # Pillow's, by image channels of the network


@dataclass
class PhotoExplainer:
    """Explains photos and films, and writes the pictures.

    Attributes:
        network: In eval mode.
        names: Of its classes.
        targets: Classes to explain; none for the most probable ones.
        top: How many of those.
        outputs: Where the pictures go.
        html: Write a page per photo, not pictures.
        versus: Classes that each target is explained against: the mean of their logits. None for none.

    Raises:
        InputError: If photos do not have the image channels that the network wants.
    """

    network: Any
    names: Sequence[str]
    targets: Sequence[int]
    top: int
    outputs: OutputPaths
    html: bool = False
    versus: Sequence[int] = ()

    def __post_init__(self) -> None:
        channels = getattr(self.network, "in_chans", 3)
        if channels not in MODES:
            raise InputError(
                f"the network sees {channels} channels, photos have 1 or 3: use timm_bcos.explain in Python"
            )
        self.mode = MODES[channels]
        cfg = timm.data.resolve_model_data_config(self.network)
        statistics = {key: tuple(cfg[key])[:channels] for key in ("mean", "std")}
        self.transform = timm.data.create_transform(**{**cfg, **statistics}, is_training=False)
        self.device = next(self.network.parameters()).device
        self.top = min(self.top, self.network.num_classes)

    def explain(self, path: Path) -> str:
        """Explain a photo or film and write its pictures.

        Returns:
            What to print of it.
        """
        return self._explain_film(path) if is_film(path) else self._explain_photo(path)

    def read(self, path: Path) -> Tensor:
        """(1, C, H, W) a photo as the network wants it, on its device."""
        x: Tensor = self.transform(open_photo(path, self.mode))
        return x[None].to(self.device)

    def _explain_photo(self, path: Path) -> str:
        x = self.read(path)
        if self.html:
            return self._explain_on_page(path, x)
        explanation = self._difference(x) if self.versus else self._of_classes(x, self.targets)
        self._save_pictures(path, explanation)
        return self._report(path, explanation)

    def _of_classes(self, x: Tensor, targets: Sequence[int]) -> Explanation:
        table = [list(targets)] if targets else None
        return Explanation.stack(explain_targets(self.network, x, table, top=self.top))

    def _difference(self, x: Tensor) -> Explanation:
        """Of each target and the mean of the others."""
        against = self.versus[0] if len(self.versus) == 1 else set(self.versus)
        return Explanation.stack([contrast(self.network, x, target, against) for target in self._asked(x)])

    def _asked(self, x: Tensor) -> list[int]:
        """The targets, or else the most probable class that is not on the other side."""
        if self.targets:
            return list(self.targets)
        count = min(len(self.versus) + 1, self.network.num_classes)
        best = [int(one.target) for one in explain_targets(self.network, x, top=count)]
        return [unit for unit in best if unit not in self.versus][:1]

    def _explain_on_page(self, path: Path, x: Tensor) -> str:
        """The page subtracts by itself."""
        asked = [*self._asked(x), *self.versus] if self.versus else self.targets
        explanation = self._of_classes(x, asked)
        page = self.outputs.claim(path.stem, ".html", self._versus_label())
        save_viewer(explanation, page, self.names, path.name, self.versus[0] if self.versus else None)
        return self._report(path, explanation)

    def _explain_film(self, path: Path) -> str:
        """A film of the explanations beside the film, for each target."""
        if self.versus:
            raise InputError("--versus explains photos; leave it out for films")
        lines = [str(path)]
        targets: Sequence[int | None] = self.targets or [None]
        for target in targets:
            label = "" if target is None or len(targets) == 1 else self._label(target)
            out = self.outputs.claim(path.stem, path.suffix, label)
            frames = explain_video(self.network, path, out, target)
            lines += [f"  {self.names[c]:<32.32} {count} frames" for c, count in frames.most_common(self.top)]
        return "\n".join(lines)

    def _report(self, path: Path, explanation: Explanation) -> str:
        if explanation.versus is not None or explanation.direction is not None:
            return "\n".join([str(path), *self._differences(explanation)])
        probability = explanation.probability.gather(1, explanation.target[:, None])[:, 0]
        rows = zip(explanation.target.tolist(), probability, explanation.completeness_error, strict=True)
        lines = [f"  {self.names[c]:<32.32} probability {p:6.4f}   completeness error {e:.1e}" for c, p, e in rows]
        return "\n".join([str(path), *lines])

    def _differences(self, explanation: Explanation) -> Iterator[str]:
        against = " + ".join(self.names[c] for c in self.versus)
        values = (explanation.target.tolist(), explanation.logit, explanation.completeness_error)
        for target, logit, error in zip(*values, strict=True):
            pair = f"{self.names[target]}, not {against}"
            yield f"  {pair:<48.48} difference of logits {logit:+7.3f}   completeness error {error:.1e}"

    def _save_pictures(self, path: Path, explanation: Explanation) -> None:
        against = self._versus_label()
        explanation.save(self.outputs.claim(path.stem, ".png", against), self.names)
        for picture, target in zip(explanation.to_rgba(), explanation.target.tolist(), strict=True):
            save_image(picture, self.outputs.claim(path.stem, ".png", self._label(target) + against))

    def _versus_label(self) -> str:
        """A part of file names, so that a difference of classes never overwrites a plain explanation."""
        return f"_versus{''.join(map(self._label, self.versus))}"[:120] if self.versus else ""

    def _label(self, target: int) -> str:
        return f"_{slug(self.names[target])[:100] or f'class-{target}'}"
