"""Explanations as batches: indices, moves, stacks, and what is of one image only."""

import copy
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.random_explanation import random_explanation
from timm_bcos import Explanation, InputError, Violation
from timm_bcos.explanation.photo import Photo

PHOTOS = tuple(Photo(Image.new("RGB", (20 + i, 15)), (0, 0, 20 + i, 15), f"{i}.jpg") for i in range(4))


@pytest.fixture
def four() -> Explanation:
    position = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    return random_explanation(4, position=position, class_names=("a", "b", "c", "d"), photos=PHOTOS)


INDICES = [
    (1, [1]),
    (-1, [3]),
    (np.int64(2), [2]),
    (torch.tensor(2), [2]),
    (slice(None), [0, 1, 2, 3]),
    (slice(1, None, 2), [1, 3]),
    (slice(None, None, -1), [3, 2, 1, 0]),
    (slice(2, 2), []),
    ([], []),
    ([3, 0, 0], [3, 0, 0]),
    ((1, -2), [1, 2]),
    (range(2), [0, 1]),
    (torch.tensor([2, 1]), [2, 1]),
    (np.array([2, 1]), [2, 1]),
    ([True, False, False, True], [0, 3]),
    (torch.tensor([False, True, True, False]), [1, 2]),
    (np.array([False] * 4), []),
]


@pytest.mark.parametrize(("index", "rows"), INDICES, ids=str)
def test_indices(four: Explanation, index: object, rows: list[int]) -> None:
    found = four[index]
    assert len(found) == len(rows)
    for name in ("logits", "target", "weights", "inputs", "bias", "constant_bias", "position", "logit"):
        assert torch.equal(getattr(found, name), getattr(four, name)[rows]), name
    assert [photo.name for photo in found.photos] == [f"{i}.jpg" for i in rows]
    assert found.class_names == four.class_names


def test_what_is_no_index(four: Explanation) -> None:
    for index in (4, -5, [0, 4]):
        with pytest.raises(IndexError, match=r"image (4|-5) of 4"):
            four[index]
    for wrong in ("a", None, 1.0, [0.5], True, [True, False], torch.zeros(2, 2, dtype=torch.long), object(), ["a"]):
        with pytest.raises(InputError, match="give an int, a slice, or a list of ints or of 4 booleans"):
            four[wrong]


def test_iteration_ends(four: Explanation) -> None:
    assert [int(one.target) for one in four] == [0, 1, 2, 3]
    assert [len(one) for one in four] == [1] * 4


def test_one_image_holds_one_image(four: Explanation) -> None:
    one = four[1]
    assert one.weights.untyped_storage().nbytes() == four.weights.untyped_storage().nbytes() // 4
    buffer = io.BytesIO()
    torch.save(one.weights, buffer)
    assert buffer.tell() < four.weights.untyped_storage().nbytes() // 2
    one.weights.zero_()
    assert four.weights[1].any()


def test_to_converts_what_is_floating_point(four: Explanation) -> None:
    for moved in (four.to(torch.float64), four.to("cpu", torch.float64), four.to(dtype=torch.float64)):
        assert moved.weights.dtype is moved.logits.dtype is torch.float64
        assert moved.target.dtype is moved.position.dtype is torch.int64
        assert torch.equal(moved.weights, four.weights.double()) and torch.equal(moved.position, four.position)
        assert moved.class_names == four.class_names and moved.photos is four.photos
    assert four.to("meta").weights.device.type == "meta"
    assert four.to(torch.device("cpu")).weights.dtype is torch.float32
    for wrong in ("nowhere", "cuda:99"):
        with pytest.raises(InputError, match=f"device='{wrong}'"):
            four.to(wrong)
    with pytest.raises(InputError, match=r"dtype=torch\.int64: give a floating-point data type"):
        four.to(torch.int64)


def test_stacking_takes_photos_and_names_along(four: Explanation) -> None:
    again = Explanation.stack([four[2:], four[:2]])
    assert [photo.name for photo in again.photos] == ["2.jpg", "3.jpg", "0.jpg", "1.jpg"]
    assert again.class_names == four.class_names
    other = random_explanation(1, position=torch.zeros(1, 2, dtype=torch.long))
    mixed = Explanation.stack([four, other])
    assert mixed.photos == () and mixed.class_names == ()
    with pytest.raises(InputError, match=re.escape("[6, 5, 5]")):
        Explanation.stack([random_explanation(), random_explanation(size=(5, 5))])


def test_names_and_photos_may_be_lists() -> None:
    listed = random_explanation(4, class_names=["a", "b", "c", "d"], photos=list(PHOTOS))
    assert listed.class_names == ("a", "b", "c", "d") and listed.photos == PHOTOS
    assert len(Explanation.stack([listed, listed]).photos) == 8
    with pytest.raises(InputError, match="class_names='abcd': give a name for each class"):
        random_explanation(class_names="abcd")


def test_a_photo_for_each_image() -> None:
    with pytest.raises(InputError, match="4 photos for 2 images: give one per image, or none"):
        random_explanation(2, photos=PHOTOS)


@pytest.mark.parametrize("method", ["overlay", "photo_map", "color_picture", "predictions", "summary"])
def test_methods_of_one_image_say_so(method: str) -> None:
    several = random_explanation(3)
    getattr(several[0], method)()
    with pytest.raises(InputError, match=rf"{method} is of one image, .* has 3: choose one, as in explanation\[0\]"):
        getattr(several, method)()
    with pytest.raises(InputError, match="has 0"):
        getattr(several[:0], method)()


def test_one_line() -> None:
    names = ("hat", "a\nvery\nlong " + 60 * "x", "<b>", "dress")
    four = random_explanation(4, class_names=names)
    shown = repr(four)
    assert "\n" not in shown and len(shown) < 300
    assert shown.startswith("<Explanation of 4 images of 12 × 16: for hat (")
    assert "; …; exact, completeness error " in shown and str(four) == shown
    broken = random_explanation(1, violations=(Violation("conv", "tanh", "unknown"), Violation("", "relu", "added")))
    assert repr(broken).endswith("not exact, 2 violations>")
    assert repr(four[:0]) == "<Explanation of 0 images of 12 × 16: nothing; exact>"


def test_explanations_can_be_copied(four: Explanation) -> None:
    again = copy.deepcopy(four)
    assert torch.equal(again.weights, four.weights) and again.photos[1].image.size == (21, 15)
