"""What an explanation explains, in words: for titles of figures, and in one line."""

from collections.abc import Sequence

from torch import Tensor

from .rows import Rows

__all__ = ["class_name", "one_line", "title", "unit_name"]

Names = Sequence[str] | None
SHOWN = 3  # images that the one line names


def unit_name(kind: str, index: int, names: Names = None) -> str:
    """The name of a class, or what stands for one: its kind and number."""
    return names[index] if names is not None and index < len(names) else f"{kind} {index}"


def class_name(explanation: Rows, index: int, names: Names = None) -> str:
    """The name of a class.

    Args:
        explanation: Explanation of a class.
        index: Index of the class.
        names: Name of each class; None for those of the explanation.
    """
    return unit_name("class", index, explanation.class_names if names is None else names)


def title(explanation: Rows, index: int, names: Names = None) -> str:
    """What is explained of one image, for instance 'for hat, not t-shirt'.

    Args:
        explanation: Explanation of N images.
        index: Index of the image.
        names: Name of each class; None for those of the explanation.
    """
    place = ""
    if explanation.position is not None:
        place = f" at {tuple(explanation.position[index].tolist())}"
    elif explanation.region is not None:
        place = " in the region"
    if explanation.layer is None:
        return _subject(explanation, index, "class", explanation.class_names if names is None else names) + place
    return f"{explanation.layer}, {_subject(explanation, index, 'unit', None).removeprefix('for ')}{place}"


def _subject(explanation: Rows, index: int, kind: str, names: Names) -> str:
    if explanation.direction is not None:
        return _of_direction(explanation.direction[index], kind, names)
    own = f"for {unit_name(kind, int(explanation.target[index]), names)}"
    if explanation.versus is None:
        return own
    return f"{own}, not {unit_name(kind, int(explanation.versus[index]), names)}"


def _of_direction(direction: Tensor, kind: str, names: Names, shown: int = 2) -> str:
    """The outputs that a direction weighs most, for and against."""
    sides = []
    for values in (direction, -direction):
        count = int((values > 0).sum())
        units = values.topk(min(count, shown)).indices.tolist()
        sides.append(" + ".join([unit_name(kind, unit, names) for unit in units] + ["…"] * (count > shown)))
    return ", ".join(f"{word} {side}" for word, side in zip(("for", "not"), sides, strict=True) if side)


def one_line(explanation: Rows) -> str:
    """The images, what is explained of them, and whether it is exact."""
    count, (height, width) = len(explanation), explanation.inputs.shape[-2:]
    images = f"{count} image{'s' * (count != 1)} of {height} × {width}"
    logits = explanation.logit.tolist()
    subjects = [_short(title(explanation, i)) + f" ({logits[i]:.3g})" for i in range(min(count, SHOWN))]
    listed = "; ".join(subjects + ["…"] * (count > SHOWN))
    return f"<Explanation of {images}: {listed or 'nothing'}; {_exactness(explanation)}>"


def _exactness(explanation: Rows) -> str:
    found = explanation.violations
    if found:
        return f"not exact, {len(found)} violation{'s' * (len(found) > 1)}"
    errors = explanation.completeness_error.tolist()
    return f"exact, completeness error {max(errors):.1e}" if errors else "exact"


def _short(text: str, length: int = 60) -> str:
    """A text in one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
