"""Explains photos and videos and writes the results, for `timm-bcos explain`."""

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
from .outputs import OutputPaths, is_video, slug

__all__ = ["PhotoExplainer"]

MODES = {1: "L", 3: "RGB"}  # Pillow modes by number of channels


@dataclass
class PhotoExplainer:
    """Explains photos and videos, and writes images, HTML files or videos.

    Attributes:
        model: Model in eval mode.
        names: Names of its classes.
        targets: Classes to explain; empty for the most probable ones.
        top: Number of most probable classes.
        outputs: Paths of the output files.
        html: Write an HTML file per photo instead of images.
        versus: Classes whose mean logit is subtracted from each target's logit; may be empty.

    Raises:
        InputError: If the model does not take gray or color images.
    """

    model: Any
    names: Sequence[str]
    targets: Sequence[int]
    top: int
    outputs: OutputPaths
    html: bool = False
    versus: Sequence[int] = ()

    def __post_init__(self) -> None:
        channels = getattr(self.model, "in_chans", 3)
        if channels not in MODES:
            raise InputError(f"the model takes {channels} channels, photos have 1 or 3: use timm_bcos.explain")
        self.mode = MODES[channels]
        cfg = timm.data.resolve_model_data_config(self.model)
        statistics = {key: tuple(cfg[key])[:channels] for key in ("mean", "std")}
        self.transform = timm.data.create_transform(**{**cfg, **statistics}, is_training=False)
        self.device = next(self.model.parameters()).device
        self.top = min(self.top, self.model.num_classes)

    def explain(self, path: Path) -> str:
        """Explain a photo or video and write the results.

        Returns:
            A report to print.
        """
        return self._explain_video(path) if is_video(path) else self._explain_photo(path)

    def read(self, path: Path) -> Tensor:
        """Read a photo as an input (1, C, H, W) of the model."""
        x: Tensor = self.transform(open_photo(path, self.mode))
        return x[None].to(self.device)

    def _explain_photo(self, path: Path) -> str:
        x = self.read(path)
        if self.html:
            return self._write_html(path, x)
        explanation = self._difference(x) if self.versus else self._of_classes(x, self.targets)
        self._save_images(path, explanation)
        return self._report(path, explanation)

    def _of_classes(self, x: Tensor, targets: Sequence[int]) -> Explanation:
        table = [list(targets)] if targets else None
        return Explanation.stack(explain_targets(self.model, x, table, top=self.top))

    def _difference(self, x: Tensor) -> Explanation:
        """Explain the difference of each target and the mean of the other classes."""
        against = self.versus[0] if len(self.versus) == 1 else set(self.versus)
        return Explanation.stack([contrast(self.model, x, target, against) for target in self._targets(x)])

    def _targets(self, x: Tensor) -> list[int]:
        """The targets; by default the most probable class that is not subtracted."""
        if self.targets:
            return list(self.targets)
        count = min(len(self.versus) + 1, self.model.num_classes)
        best = [int(one.target) for one in explain_targets(self.model, x, top=count)]
        return [unit for unit in best if unit not in self.versus][:1]

    def _write_html(self, path: Path, x: Tensor) -> str:
        """Write an HTML file, in which the viewer subtracts classes."""
        targets = [*self._targets(x), *self.versus] if self.versus else self.targets
        explanation = self._of_classes(x, targets)
        page = self.outputs.claim(path.stem, ".html", self._versus_label())
        save_viewer(explanation, page, self.names, path.name, self.versus[0] if self.versus else None)
        return self._report(path, explanation)

    def _explain_video(self, path: Path) -> str:
        """Write a video with the explanations beside the frames, for each target."""
        if self.versus:
            raise InputError("--versus is for photos: leave it out for videos")
        lines = [str(path)]
        targets: Sequence[int | None] = self.targets or [None]
        for target in targets:
            label = "" if target is None or len(targets) == 1 else self._label(target)
            out = self.outputs.claim(path.stem, path.suffix, label)
            frames = explain_video(self.model, path, out, target)
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

    def _save_images(self, path: Path, explanation: Explanation) -> None:
        against = self._versus_label()
        explanation.save(self.outputs.claim(path.stem, ".png", against), self.names)
        for picture, target in zip(explanation.to_rgba(), explanation.target.tolist(), strict=True):
            save_image(picture, self.outputs.claim(path.stem, ".png", self._label(target) + against))

    def _versus_label(self) -> str:
        """A part of file names that distinguishes differences from plain explanations."""
        return f"_versus{''.join(map(self._label, self.versus))}"[:120] if self.versus else ""

    def _label(self, target: int) -> str:
        return f"_{slug(self.names[target])[:100] or f'class-{target}'}"
