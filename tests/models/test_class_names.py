"""Files of class names."""

from pathlib import Path

import pytest

from timm_bcos.models.class_names import read_class_names


@pytest.mark.parametrize("end", ["", "\n"])
def test_names_of_classes_end_at_line_feeds_only(tmp_path: Path, end: str) -> None:
    names = ["one\u2028two", "three\x0bfour\x0c", "\x1cfive\x85", "six\rseven", ""]
    file = tmp_path / "names.txt"
    file.write_bytes(("\n".join(names) + (end or "\n")).encode())
    assert read_class_names(file, 5) == names
    file.write_bytes(b"a\r\nb\r\n")
    assert read_class_names(file, 2) == ["a", "b"]
