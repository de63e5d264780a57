"""Explains photos and videos and writes the results, for `timm-bcos explain`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from ..errors import InputError
from ..explainer import Explainer, PreparedPhotos
from ..explanation.result import Explanation
from ..explanation.video import explain_video
from ..explanation.visualization import save_image
from ..viewer.document import save_viewer
from .outputs import OutputPaths, is_video, save_photo, slug

__all__ = ["PhotoWriter"]

LONGEST_LABEL = 120  # characters of the part of a file name that names the subtracted classes


@dataclass
class PhotoWriter:
    """Explains photos and videos, and writes images, HTML files or videos.

    Attributes:
        explainer: Explainer of the model.
        outputs: Paths of the output files.
        targets: Classes to explain; empty for the most probable ones.
        versus: Classes whose mean logit is subtracted from each target's logit; may be empty.
        top: Number of most probable classes.
        scale: Side of the cells of overlays and HTML files, in pixels of the model's image; None for the default.
        html: Write an HTML file per photo instead of images.
        as_json: Report in JSON, a line per explanation.
    """

    explainer: Explainer
    outputs: OutputPaths
    targets: Sequence[int] = ()
    versus: Sequence[int] = ()
    top: int = 3
    scale: int | None = None
    html: bool = False
    as_json: bool = False

    def write(self, path: Path) -> str:
        """Explain a photo or video and write the results.

        Returns:
            A report to print.
        """
        if is_video(path):
            return self._write_video(path)
        photo = self.explainer.read(path)
        explanation = self._differences(photo) if self.versus and not self.html else self._classes(photo)
        if self.html:
            page = self.outputs.claim(path.stem, ".html", self._versus_label())
            save_viewer(explanation, page, versus=self.versus[0] if self.versus else None, scale=self.scale)
        else:
            self._save_images(path, explanation)
        return self._report(path, explanation)

    @property
    def names(self) -> Sequence[str]:
        """Names of the model's classes."""
        return self.explainer.class_names

    def _classes(self, photo: PreparedPhotos) -> Explanation:
        """Explain each class; for the viewer, which subtracts classes itself, also those to subtract."""
        targets = list(self.targets)
        if self.versus:
            targets = [*(targets or self._subtract(photo, None).target.tolist()), *self.versus]
        top = min(self.top, len(self.names))
        return self.explainer.explain_targets(photo, targets or None, top=top)[0]

    def _differences(self, photo: PreparedPhotos) -> Explanation:
        """Explain the difference of each target and the mean of the other classes."""
        targets: Sequence[int | None] = self.targets or [None]
        return Explanation.stack([self._subtract(photo, target) for target in targets])

    def _subtract(self, photo: PreparedPhotos, target: int | None) -> Explanation:
        versus = self.versus[0] if len(self.versus) == 1 else set(self.versus)
        return self.explainer(photo, target, versus=versus)

    def _save_images(self, path: Path, explanation: Explanation) -> None:
        """A figure; and for each class its explanation in color, and the overlay at the photo's own size."""
        against = self._versus_label()
        explanation.save(self.outputs.claim(path.stem, ".png", against), scale=self.scale)
        for row, (picture, target) in enumerate(zip(explanation.to_rgba(), explanation.target.tolist(), strict=True)):
            label = self._label(target) + against
            save_image(picture, self.outputs.claim(path.stem, ".png", label))
            save_photo(explanation[row].overlay(self.scale), self.outputs.claim(path.stem, ".jpg", f"{label}_overlay"))

    def _write_video(self, path: Path) -> str:
        """Write a video with the explanations beside the frames, for each target."""
        for option, is_given in {"--versus": self.versus, "--crop": self.explainer.crop != "center"}.items():
            if is_given:
                raise InputError(f"{option} is for photos: leave it out for videos")
        lines = [str(path)]
        targets: Sequence[int | None] = self.targets or [None]
        for target in targets:
            label = "" if target is None or len(targets) == 1 else self._label(target)
            out = self.outputs.claim(path.stem, path.suffix, label)
            frames = explain_video(self.explainer.model, path, out, target)
            lines += [f"  {self.names[c]:<32.32} {count} frames" for c, count in frames.most_common(self.top)]
        return "\n".join(lines)

    def _report(self, path: Path, explanation: Explanation) -> str:
        if self.as_json:
            rows = [explanation[i].summary() for i in range(len(explanation))]
            return "\n".join(json.dumps({"path": str(path), **row}) for row in rows)
        is_difference = explanation.versus is not None or explanation.direction is not None
        lines = self._lines_of_differences(explanation) if is_difference else self._lines_of_classes(explanation)
        return "\n".join([str(path), *self._geometry(explanation[0]), *lines])

    def _lines_of_classes(self, explanation: Explanation) -> Iterator[str]:
        probability = explanation.probability.gather(1, explanation.target[:, None])[:, 0]
        for c, p, e in zip(explanation.target.tolist(), probability, explanation.completeness_error, strict=True):
            yield f"  {self.names[c]:<32.32} probability {p:6.4f}   completeness error {e:.1e}"

    def _lines_of_differences(self, explanation: Explanation) -> Iterator[str]:
        against = " + ".join(self.names[c] for c in self.versus)
        values = (explanation.target.tolist(), explanation.logit, explanation.completeness_error)
        for target, logit, error in zip(*values, strict=True):
            pair = f"{self.names[target]}, not {against}"
            yield f"  {pair:<48.48} difference of logits {logit:+7.3f}   completeness error {error:.1e}"

    def _versus_label(self) -> str:
        """A part of file names that distinguishes differences from plain explanations, and from each other."""
        label = "".join(map(self._label, self.versus))
        if len(label) > LONGEST_LABEL:
            label = f"{label[:LONGEST_LABEL]}-{crc32(label.encode(errors='replace')):08x}"
        return f"_versus{label}" if self.versus else ""

    def _label(self, target: int) -> str:
        return f"_{slug(self.names[target])[:100] or f'class-{target}'}"

    def _geometry(self, explanation: Explanation) -> Iterator[str]:
        """What the model's image shows besides the photo, and whether its aspect ratio differs."""
        (photo,) = explanation.photos
        left, top, right, bottom = photo.box
        if photo.padding > 0:
            part = explanation.contribution_map.double().sum() - explanation.photo_map().sum()
            name = self.names[int(explanation.target[0])]
            yield f"  {photo.padding:.0%} of the model's image is padding, which contributes {part:+.3f} to {name}"
        elif (left, top) == (0, 0) and (right, bottom) == photo.image.size and right != bottom:
            yield f"  the model sees all {right:.0f} × {bottom:.0f} pixels, resized to the shape of its image"
