"""Explanations in files: what comes back, and files that are damaged, foreign or hostile."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.helpers.random_explanation import random_explanation
from timm_bcos import Explanation, InputError, Violation
from timm_bcos.explanation.photo import Photo

NAMES = ("hat", "T-Shirt ☂", "\udcff broken", "")


def colorful(width: int, height: int, mode: str = "RGB") -> Image.Image:
    generator = np.random.default_rng(0)
    values = generator.integers(0, 256, (height, width, len(mode)), np.uint8)
    return Image.fromarray(values[..., 0] if mode == "L" else values)


def everything() -> Explanation:
    """Each field with something in it."""
    return random_explanation(
        2, class_names=NAMES, layer="blocks.3", probability_kind="softmax", logit_bias=-1.5, rounding=1e-9,
        violations=(Violation("conv", "tanh", "unknown"), Violation("", "0.3", "incomplete")),
        position=torch.tensor([[0, 1], [2, 3]]), versus=torch.tensor([2, 3]), direction=torch.randn(2, 4),
        region=torch.rand(2, 3, 3),
        photos=(Photo(colorful(5, 7), (0.5, -1, 4, 8), "a.jpg"), Photo(colorful(9, 2, "L"), (0, 0, 9, 2), "ü.png")),
    )  # fmt: skip


def assert_same(found: Explanation, expected: Explanation) -> None:
    for field in fields(Explanation):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        if isinstance(b, Tensor):
            assert a.dtype is b.dtype and torch.equal(a, b), field.name
        elif field.name == "photos":
            assert [(p.box, p.name, p.image.mode, p.image.tobytes()) for p in a] == [
                (p.box, p.name, p.image.mode, p.image.tobytes()) for p in b
            ]
        else:
            assert a == b, field.name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_everything_comes_back(dtype: torch.dtype, tmp_path: Path) -> None:
    explanation = everything().to(dtype)
    explanation.save(tmp_path / "new" / "why.NPZ")
    assert_same(Explanation.load(str(tmp_path / "new" / "why.NPZ")), explanation)
    assert os.listdir(tmp_path / "new") == ["why.NPZ"]


@pytest.mark.parametrize("images", [0, 1, 3])
def test_the_least_comes_back(images: int, tmp_path: Path) -> None:
    explanation = random_explanation(3)[:images]
    explanation.save(tmp_path / "why.npz")
    assert_same(Explanation.load(tmp_path / "why.npz"), explanation)


def test_names_are_written(tmp_path: Path) -> None:
    random_explanation().save(tmp_path / "why.npz", ["a", "b", "c", "d"])
    assert Explanation.load(tmp_path / "why.npz").class_names == ("a", "b", "c", "d")


def test_names_that_do_not_fit_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="2 class names for 4 classes: give one for each, or none"):
        random_explanation().save(tmp_path / "why.npz", ["a", "b"])
    assert not list(tmp_path.iterdir())


def test_layouts_in_memory_do_not_matter(tmp_path: Path) -> None:
    plain = random_explanation(2)
    values = {field.name: getattr(plain, field.name) for field in fields(plain)}
    values["weights"] = plain.weights.contiguous(memory_format=torch.channels_last).requires_grad_()
    values["inputs"] = plain.inputs[:1].expand(2, -1, -1, -1)
    Explanation(**values).save(tmp_path / "why.npz")
    found = Explanation.load(tmp_path / "why.npz")
    assert torch.equal(found.weights, plain.weights) and torch.equal(found.inputs[1], plain.inputs[0])


def test_one_image_of_a_batch_is_stored_alone(tmp_path: Path) -> None:
    several = random_explanation(8, size=(40, 40))
    several.save(tmp_path / "all.npz")
    several[3].save(tmp_path / "one.npz")
    assert (tmp_path / "one.npz").stat().st_size < (tmp_path / "all.npz").stat().st_size / 7
    assert_same(Explanation.load(tmp_path / "one.npz"), several[3])


def test_only_arrays_and_json(tmp_path: Path) -> None:
    everything().save(tmp_path / "why.npz")
    with np.load(tmp_path / "why.npz", allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    assert all(array.dtype.kind in "fiu" for array in arrays.values())
    header = json.loads(arrays["header"].tobytes())
    assert header["fields"]["class_names"] == list(NAMES)
    assert Image.open(io.BytesIO(arrays["photo_1"].tobytes())).format == "PNG"


def test_the_suffix_says_the_format(tmp_path: Path) -> None:
    explanation = random_explanation()
    for name in ("why.png", "why.PDF", "why.svg", "why.jpg"):
        explanation.save(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000
    for name in ("why.nonsense", "why", "why.npy", ".npz"):
        with pytest.raises(InputError, match=r"the suffix .* is not supported: give \.npz .* picture: .*\.png"):
            explanation.save(tmp_path / name)
    with pytest.raises(InputError, match="is a directory"):
        (tmp_path / "folder.npz").mkdir()
        explanation.save(tmp_path / "folder.npz")
    assert len(os.listdir(tmp_path)) == 5


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "why.npz"
    random_explanation().save(path)
    before = path.read_bytes()

    def torn(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", torn)
    with pytest.raises(OSError, match="disk full"):
        random_explanation(2).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["why.npz"]


class Bomb:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, ("pickle_was_executed",))


Change = Callable[[dict[str, Any], dict[str, Any]], None]


def _set(place: str, value: Any) -> Change:
    """A change of the arrays, or of the header ('fields.layer')."""

    def change(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        *path, last = place.split(".")
        target: Any = header if path or last in header else arrays
        for step in path:
            target = target[step]
        target[last] = value

    return change


def _drop(place: str) -> Change:
    def change(header: dict[str, Any], arrays: dict[str, Any]) -> None:
        *path, last = place.split(".")
        target: Any = header if path else arrays
        for step in path:
            target = target[step]
        del target[last]

    return change


HOSTILE: dict[str, Change] = {
    "objects": _set("weights", np.array([Bomb()], dtype=object)),
    "other shape": _set("weights", np.zeros((2, 6, 12, 15), np.float32)),
    "fewer dimensions": _set("weights", np.zeros(3, np.float32)),
    "other images": _set("bias", np.zeros(3, np.float32)),
    "odd channels": lambda header, arrays: arrays.update(
        weights=arrays["weights"][:, :5], inputs=arrays["inputs"][:, :5]
    ),
    "other type": _set("weights", np.zeros((2, 6, 12, 16), np.int32)),
    "big endian": lambda header, arrays: arrays.update(weights=arrays["weights"].astype(">f4")),
    "texts": _set("weights", np.array(["a", "b"])),
    "complex": _set("logits", np.zeros((2, 4), np.complex64)),
    "structured": _set("bias", np.zeros(2, [("a", "f4")])),
    "no such class": _set("target", np.array([0, 4])),
    "negative class": _set("versus", np.array([0, -1])),
    "fractions of classes": lambda header, arrays: (
        arrays.update(target=np.array([0.5, 0.5])), header["dtypes"].update(target="float64")
    ),
    "array is missing": _drop("inputs"),
    "field is missing": _drop("dtypes.inputs"),
    "type without array": _set("dtypes.more", "float32"),
    "no type": _set("dtypes.weights", "load"),
    "not a text": _set("dtypes.weights", ["float32"]),
    "other format": _set("format", "something"),
    "newer version": _set("version", 2),
    "not an object": _set("fields", 3),
    "number for an array": lambda header, arrays: (
        header["fields"].update(position=5), header["dtypes"].pop("position")
    ),
    "unknown field": _set("fields.__class__", "x"),
    "wrong kind": _set("fields.probability_kind", "exp"),
    "wrong layer": _set("fields.layer", 7),
    "wrong bias": _set("fields.logit_bias", "1"),
    "wrong rounding": _set("fields.rounding", None),
    "rounding is NaN": _set("fields.rounding", float("nan")),
    "rounding is infinite": _set("fields.rounding", float("inf")),
    "negative rounding": _set("fields.rounding", -5),
    "bias is NaN": _set("fields.logit_bias", float("nan")),
    "bias beyond floats": _set("fields.logit_bias", 10**400),
    "box beyond floats": lambda header, arrays: header["fields"]["photos"][0].update(box=[0, 0, 10**400, 2]),
    "too few names": _set("fields.class_names", ["hat"]),
    "too many names": _set("fields.class_names", list("abcde")),
    "negative position": _set("position", np.array([[0, 1], [-1, 0]])),
    **{
        f"classes of type {kind}": lambda header, arrays, kind=kind: (
            arrays.update(target=np.array([0, 1], kind)), header["dtypes"].update(target=kind)
        )
        for kind in ("int8", "uint8", "bool", "int32")
    },
    "no pixels": lambda header, arrays: arrays.update(
        weights=arrays["weights"][:, :, :0], inputs=arrays["inputs"][:, :, :0]
    ),
    "no channels": lambda header, arrays: arrays.update(
        weights=arrays["weights"][:, :0], inputs=arrays["inputs"][:, :0]
    ),
    "region without positions": _set("region", np.zeros((2, 0, 3), np.float32)),
    "wrong names": _set("fields.class_names", [1, 2]),
    "names are a text": _set("fields.class_names", "abcd"),
    "wrong violation": _set("fields.violations", [["a", "b", "nonsense"]]),
    "short violation": _set("fields.violations", [["a", "b"]]),
    "violations are none": _set("fields.violations", None),
    "empty box": lambda header, arrays: header["fields"]["photos"][0].update(box=[1, 1, 1, 2]),
    "endless box": lambda header, arrays: header["fields"]["photos"][0].update(box=[0, 0, float("inf"), 2]),
    "box of texts": lambda header, arrays: header["fields"]["photos"][0].update(box="abcd"),
    "no photo": _drop("photo_1"),
    "photos for some": lambda header, arrays: header["fields"]["photos"].pop(),
    "photo is broken": _set("photo_0", np.frombuffer(b"\x89PNG\r\n\x1a\n then nonsense", np.uint8)),
    "photo is of another format": lambda header, arrays: arrays.update(photo_0=_as_bytes(colorful(5, 7), "bmp")),
    "header is no JSON": lambda header, arrays: arrays.update(header=np.zeros(5, np.uint8)),
    "header is a list": lambda header, arrays: arrays.update(header=np.frombuffer(b"[]", np.uint8)),
    "header is deep": lambda header, arrays: arrays.update(header=np.frombuffer(b"[" * 10**5, np.uint8)),
    "no header": lambda header, arrays: arrays.update(header=None),
}  # fmt: skip


def _as_bytes(image: Image.Image, kind: str) -> np.ndarray:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files(change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    everything().save("why.npz")
    with np.load("why.npz") as file:
        arrays: dict[str, Any] = {name: file[name] for name in file.files}
    header = json.loads(arrays.pop("header").tobytes())
    change(header, arrays)
    own = arrays.pop("header", np.frombuffer(json.dumps(header).encode(), np.uint8))
    if own is not None:
        arrays["header"] = own
    np.savez("why.npz", **arrays)
    with pytest.raises(InputError, match=r"^why\.npz"):
        Explanation.load("why.npz")
    assert not Path("pickle_was_executed").exists()


def _compressed(path: Path) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    np.savez_compressed(path, **arrays)


def _overlapping(path: Path) -> None:
    """Many members that are the same bytes: small on disk, large in memory."""
    with zipfile.ZipFile(path, "a") as archive:
        member = archive.getinfo("weights.npy")
        archive.filelist.extend([member] * 500)
        archive._didModify = True


def _member(name: str, data: bytes) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(name, data)

    return change


def _huge_header() -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (10**6, 10**6)})
    return buffer.getvalue()


DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an archive"),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Bomb())),
    "torch": lambda path: torch.save({"a": torch.zeros(2)}, path),
    "array alone": lambda path: path.write_bytes(_as_bytes(colorful(2, 2), "png").tobytes()),
    "foreign archive": lambda path: np.savez(path, weights=np.zeros(3)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "first half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "changed byte": lambda path: path.write_bytes(
        (data := path.read_bytes())[: len(data) // 2] + bytes([data[len(data) // 2] ^ 255]) + data[len(data) // 2 + 1 :]
    ),
    "compressed": _compressed,
    "overlapping": _overlapping,
    "member is no array": _member("more.txt", b"text"),
    "claims to be huge": _member("more.npy", _huge_header()),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "missing": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_damaged_files(damage: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    random_explanation(2).save("why.npz")
    damage(Path("why.npz"))
    with pytest.raises(InputError, match=r"why\.npz"):
        Explanation.load("why.npz")
    assert not Path("pickle_was_executed").exists()
