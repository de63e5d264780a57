"""Explanations in files: arrays and JSON in an uncompressed .npz archive, without pickle.

Files of strangers can be read, too: arrays of objects are refused, and so are compressed archives, because a small one
could take all memory.
"""

import io
import json
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import fields
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..dynamic_linear.violations import TEXTS, Violation
from ..errors import InputError
from ..files import atomic_path, first_line
from .photo import Photo
from .rows import Rows

__all__ = ["check_picture_suffix", "is_archive", "read", "write"]

E = TypeVar("E", bound=Rows)
SUFFIX = ".npz"
FORMAT, VERSION = "timm_bcos.Explanation", 1
# How NumPy holds numbers that it has no type for, such as bfloat16: as integers of the same size.
BITS = {1: torch.uint8, 2: torch.int16}
DTYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}


def is_archive(path: str | PathLike[str]) -> bool:
    """Whether a path has the suffix of files that `write` writes."""
    return Path(path).suffix.lower() == SUFFIX


def check_picture_suffix(path: str | PathLike[str]) -> None:
    """Refuse a path whose suffix is none of a picture's.

    Raises:
        InputError: Naming the suffixes that there are.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    suffix, known = Path(path).suffix, sorted(FigureCanvasBase.get_supported_filetypes())
    if suffix.lower().removeprefix(".") not in known:
        raise InputError(
            f"{path}: the suffix {suffix!r} is not supported: give {SUFFIX} for the numbers, or that of a picture: "
            f".{', .'.join(known)}"
        )


def write(explanation: Rows, path: str | PathLike[str]) -> None:
    """Write an explanation, whole or not at all.

    Raises:
        InputError: If its names are not those of its classes.
    """
    _check_names(explanation.class_names, explanation.logits.shape[1])
    values = {field.name: getattr(explanation, field.name) for field in fields(explanation)}
    tensors = {name: value.detach().cpu() for name, value in values.items() if isinstance(value, Tensor)}
    notes = {name: value for name, value in values.items() if name not in tensors}
    notes["violations"] = [[one.module, one.function, one.kind] for one in explanation.violations]
    notes["photos"] = [{"box": list(map(float, one.box)), "name": one.name} for one in explanation.photos]
    kinds = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in tensors.items()}
    pictures = {f"photo_{i}": _bytes(_to_png(photo)) for i, photo in enumerate(explanation.photos)}
    header = json.dumps({"format": FORMAT, "version": VERSION, "dtypes": kinds, "fields": notes})
    arrays: Any = {name: _to_array(tensor) for name, tensor in tensors.items()} | pictures
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, header=_bytes(header.encode()), **arrays)


def _to_array(tensor: Tensor) -> np.ndarray:
    try:
        return tensor.contiguous().numpy()
    except TypeError:
        return tensor.contiguous().view(BITS[tensor.element_size()]).numpy()


def _bytes(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def _to_png(photo: Photo) -> bytes:
    image = photo.image if photo.image.mode in ("L", "RGB", "RGBA") else photo.image.convert("RGB")
    buffer = io.BytesIO()
    image.save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def read(kind: type[E], path: str | PathLike[str]) -> E:
    """Read what `write` has written.

    Args:
        kind: The class `Explanation`.
        path: The file.

    Raises:
        InputError: For a file that is missing, damaged, or not an explanation.
    """
    try:
        return kind(**_fields(_arrays(Path(path))))
    except FileNotFoundError:
        raise InputError(f"no file at {path}") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except KeyError as error:
        raise InputError(f"{path} is damaged: {error} is missing in it") from error
    except Exception as error:  # decoders of damaged files raise errors of every kind
        raise InputError(f"{path} is damaged, or not an explanation: {first_line(error)}") from error


def _arrays(path: Path) -> dict[str, np.ndarray]:
    if path.exists() and not path.is_file():
        raise InputError("not a regular file")
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise InputError("the archive is compressed: give a file that Explanation.save has written")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise InputError("the archive is damaged: its parts are larger than the file")
        return {member.filename.removesuffix(".npy"): _array(archive.read(member)) for member in members}


def _array(data: bytes) -> np.ndarray:
    array: np.ndarray = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return array


def _fields(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The arguments of `Explanation`, checked."""
    notes, kinds = _header(arrays)
    tensors = {name: _to_tensor(name, arrays[name], kind) for name, kind in kinds.items()}
    _check_tensors(tensors)
    _check_notes(notes)
    _check_names(notes["class_names"], tensors["logits"].shape[1])
    found = notes | tensors
    found["violations"] = tuple(Violation(*one) for one in notes["violations"])
    found["class_names"] = tuple(notes["class_names"])
    found["photos"] = tuple(_photo(one, arrays[f"photo_{i}"]) for i, one in enumerate(notes["photos"]))
    return found


def _header(arrays: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields that are no tensors, and the data types of those that are."""
    header = json.loads(arrays["header"].tobytes()) if "header" in arrays else {}
    if header.get("format") != FORMAT:
        raise InputError("not an explanation: give a file that Explanation.save has written")
    if header["version"] != VERSION:
        raise InputError(f"version {header['version']!r} of the format, this package reads version {VERSION}")
    return dict(header["fields"]), dict(header["dtypes"])


def _to_tensor(name: str, array: np.ndarray, kind: str) -> Tensor:
    if name not in SHAPES or kind not in DTYPES:
        raise InputError(f"{name!r} of type {kind!r} is not part of an explanation")
    dtype = DTYPES[kind]
    tensor = torch.from_numpy(array)
    if tensor.dtype != dtype and tensor.dtype == BITS.get(dtype.itemsize):
        tensor = tensor.view(dtype)
    if tensor.dtype != dtype or not (dtype is torch.int64 if name in INDICES else dtype.is_floating_point):
        raise InputError(f"{name} cannot be of type {tensor.dtype} (the file says {kind})")
    return tensor


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    missing = [name for name in REQUIRED if name not in tensors]
    if missing:
        raise InputError(f"damaged: {', '.join(missing)} is missing in it")
    sizes = {"2": 2}
    for name, tensor in tensors.items():
        letters = SHAPES[name]
        fits = len(letters) == tensor.ndim
        if not fits or any(sizes.setdefault(letter, n) != n for letter, n in zip(letters, tensor.shape, strict=True)):
            raise InputError(f"{name} has the shape {tuple(tensor.shape)}, which does not fit the other arrays")
    for name in ("target", "versus"):
        if name in tensors and not bool(((tensors[name] >= 0) & (tensors[name] < sizes["K"])).all()):
            raise InputError(f"{name} names classes that do not exist: there are {sizes['K']}")
    if "position" in tensors and bool((tensors["position"] < 0).any()):
        raise InputError("position holds negative numbers")
    empty = [name for name, tensor in tensors.items() if 0 in tensor.shape[1:]]
    if empty:
        raise InputError(f"{empty[0]} has the shape {tuple(tensors[empty[0]].shape)}, which holds nothing")
    if sizes["C"] % 2:
        raise InputError(f"{sizes['C']} channels: encoded images have an even number")


def _check_names(names: Sequence[str], classes: int) -> None:
    if names and len(names) != classes:
        raise InputError(f"{len(names)} class names for {classes} classes: give one for each, or none")


def _check_notes(notes: dict[str, Any]) -> None:
    for name, value in notes.items():
        if name not in NOTES and name not in SHAPES:
            raise InputError(f"{name!r} is not part of an explanation")
        if not (value is None if name in SHAPES else NOTES[name](value)):
            raise InputError(f"damaged: {name} is {str(value)[:100]!r}")


def _photo(notes: dict[str, Any], data: np.ndarray) -> Photo:
    from PIL import Image

    with Image.open(io.BytesIO(data.tobytes()), formats=("PNG",)) as image:
        image.load()
    left, top, right, bottom = notes["box"]
    return Photo(image, (left, top, right, bottom), notes["name"])


def _is_number(value: object) -> bool:
    """Whether it is a number that a float can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return abs(value) <= sys.float_info.max


def _are_texts(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_violation(value: Any) -> bool:
    return _are_texts(value) and len(value) == 3 and value[2] in TEXTS


def _is_photo(value: Any) -> bool:
    box = value["box"]
    if not isinstance(value["name"], str) or len(box) != 4 or not all(map(_is_number, box)):
        return False
    return bool(box[0] < box[2] and box[1] < box[3])


# Dimensions: images, classes, channels, height and width, rows and columns of a region.
SHAPES = dict(
    logits="NK", target="N", weights="NCHW", inputs="NCHW", bias="N", constant_bias="N", position="N2", versus="N",
    direction="NK", region="NRS",
)  # fmt: skip
REQUIRED = ("logits", "target", "weights", "inputs", "bias", "constant_bias")
INDICES = ("target", "position", "versus")
NOTES: dict[str, Callable[[Any], bool]] = dict(
    violations=lambda value: all(map(_is_violation, value)),
    logit_bias=_is_number,
    layer=lambda value: value is None or isinstance(value, str),
    probability_kind=lambda value: value in ("sigmoid", "softmax"),
    rounding=lambda value: _is_number(value) and value >= 0,
    class_names=_are_texts,
    photos=lambda value: all(map(_is_photo, value)),
)
