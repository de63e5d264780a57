"""Names of classes: files of them, and classes by their names."""

from pathlib import Path

import numpy as np
import pytest

from timm_bcos import TargetError
from timm_bcos.models.class_names import find_class, find_classes, read_class_names


@pytest.mark.parametrize("end", ["", "\n"])
def test_names_of_classes_end_at_line_feeds_only(tmp_path: Path, end: str) -> None:
    names = ["one\u2028two", "three\x0bfour\x0c", "\x1cfive\x85", "six\rseven", ""]
    file = tmp_path / "names.txt"
    file.write_bytes(("\n".join(names) + (end or "\n")).encode())
    assert read_class_names(file, 5) == names
    file.write_bytes(b"a\r\nb\r\n")
    assert read_class_names(file, 2) == ["a", "b"]


NAMES = ["tabby cat", "tiger cat", "jackfruit", "crane", "crane", "Hat", "hat", "t-shirt", "10", "custard apple"]
NAMES += ["pineapple", "Eskimo dog"]


@pytest.mark.parametrize(
    ("wanted", "index"),
    [
        ("tabby cat", 0), ("TABBY CAT", 0), ("tabby", 0), ("Tabby", 0), ("tabby_cat", 0), (" tabby-cat ", 0),
        ("tiger", 1), ("jackfruit", 2), ("Hat", 5), ("hat", 6), ("t-shirt", 7), ("T shirt", 7), ("shirt", 7),
        ("10", 8), ("9", 9), ("11", 11), ("eskimo", 11), ("4", 4),
    ],
)  # fmt: skip
def test_classes_are_found_by_names_and_whole_words(wanted: str, index: int) -> None:
    assert find_class(wanted, NAMES, len(NAMES)) == index


@pytest.mark.parametrize(
    ("wanted", "text"),
    [
        ("fruit", "no class is called 'fruit'; close names: jackfruit"),  # part of a word
        ("apple", r"several classes match 'apple': custard apple \(9\), pineapple \(10\); give a whole name"),
        ("cat", r"several classes match 'cat': tabby cat \(0\), tiger cat \(1\); give a whole name or an index"),
        ("crane", r"several classes match 'crane': crane \(3\), crane \(4\); give an index"),
        ("HAT", r"several classes match 'HAT': Hat \(5\), hat \(6\); give an index"),
        ("taby", "no class is called 'taby'; close names: tabby cat; or give an index, 0 to 11"),
        ("12", "class 12: the model has 12 classes, counted from 0"),
        ("-1", "no class is called '-1'; "),
        ("", "no class is called ''; give an index"),
        (" - ", "no class is called ' - '; give an index"),
        ("zebra", "no class is called 'zebra'; give an index, 0 to 11"),
    ],
)
def test_classes_that_are_not_found(wanted: str, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        find_class(wanted, NAMES, len(NAMES))


def test_names_within_targets() -> None:
    assert find_classes(["tiger", 3, "hat"], NAMES) == [1, 3, 6]
    assert find_classes({"tiger", "jackfruit"}, NAMES) == {1, 2}
    assert find_classes([("tiger", 0), ("hat", 1)], NAMES) == [(1, 0), (6, 1)]
    assert find_classes(np.array(["tiger", "hat"]), NAMES) == [1, 6]
    assert find_classes(None, NAMES) is None and find_classes(7, NAMES) == 7


def test_names_in_any_iterable() -> None:
    for form in (iter(["hat", 3]), (name for name in ("hat", 3)), {"hat": 0, 3: 1}.keys()):
        assert find_classes(form, NAMES) == [6, 3]
    assert find_classes([iter(["hat"]), range(2)], NAMES) == [[6], [0, 1]]
    for other in ({"hat": 0}, b"hat", 3, None):
        assert find_classes(other, NAMES) is other


def test_accents_are_the_same_however_they_are_composed() -> None:
    names = ["cafe\u0301", "caf\u00e9 noir", "tea"]
    for wanted in ("caf\u00e9", "cafe\u0301", "CAF\u00c9", "CAFE\u0301"):
        assert find_class(wanted, names, 3) == 0
    assert find_class("cafe\u0301-noir", names, 3) == 1
    with pytest.raises(TargetError, match="no class is called 'cafe'"):
        find_class("cafe", names, 3)


def test_names_that_several_classes_have() -> None:
    with pytest.raises(TargetError, match=r"several classes match 'a': a \(0\), a \(1\); give an index"):
        find_class("a", ["a", "a", "b"], 3)
