"""Photos in a folder per class, read as `timm-bcos explain` reads photos: rotated by their EXIF data, in any format."""

from collections.abc import Sequence
from pathlib import Path

import timm
import timm.utils
from PIL import Image

from ..errors import InputError
from ..files import sha256
from .datasets import SPLITS
from .photos import find_photos, open_photo

__all__ = ["ClassFolders", "read_splits"]


class ClassFolders:
    """A labeled data set of the photos in a folder per class. Subfolders of a class belong to it.

    Args:
        root: Directory with a folder per class. Hidden folders and loose files are ignored.
        class_names: Names of all classes in their order; None for the names of the folders, in timm's order. With
            names given, folders may be missing.

    Attributes:
        root: Directory.
        class_names: Names of the classes.
        paths: Path of each photo, class by class.
        labels: Class of each photo.

    Raises:
        InputError: If the directory or a folder cannot be read, has no photos, or is not one of the given classes.
    """

    def __init__(self, root: Path, class_names: Sequence[str] | None = None) -> None:
        found = _folders(root)
        if not found:
            raise InputError(f"no folders in {root}: put the photos of each class into a folder named after it")
        self.root = root
        self.class_names = list(class_names or found)
        unknown = [name for name in found if name not in self.class_names]
        if unknown:
            raise InputError(f"{root} has a folder {unknown[0]!r}, which is none of the classes {self.class_names}")
        photos = {name: list(find_photos([root / name])) for name in found}
        self.paths = [path for paths in photos.values() for path in paths]
        self.labels = [self.class_names.index(name) for name, paths in photos.items() for _ in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        """A photo and its class.

        Raises:
            InputError: If the photo cannot be read; it names the file.
        """
        try:
            return open_photo(self.paths[index]), self.labels[index]
        except InputError as error:
            raise InputError(f"{self.filename(index)}: {error}") from error

    def digest(self, index: int) -> str:
        """The SHA-256 of a photo's file.

        Raises:
            InputError: If the file cannot be read.
        """
        try:
            return sha256(self.paths[index])
        except OSError as error:
            raise InputError(f"{self.filename(index)}: {error.strerror}") from error

    def filename(self, index: int) -> str:
        """The path of a photo below the directory."""
        return self.paths[index].relative_to(self.root).as_posix()


def read_splits(root: Path) -> tuple[ClassFolders, ClassFolders | None]:
    """Read a directory of photos for training, and for validation if it has folders of both.

    Args:
        root: Directory with a folder per class, or with folders `train` and, optionally, `validation` that have one.

    Raises:
        InputError: See `ClassFolders`; and if there are folders of splits and of classes side by side, or no folder
            `train` among splits.
    """
    splits = [next((root / name for name in names if _is_split(root / name)), None) for names in SPLITS]
    if not any(splits):
        return ClassFolders(root), None
    _refuse_mixed(root, [split.name for split in splits if split])
    if splits[0] is None:
        found = ", ".join(split.name for split in splits if split)
        raise InputError(
            f"{root} has no folder 'train' beside {found}: put the photos to train on into it, or give the directory "
            f"that has a folder per class"
        )
    train = ClassFolders(splits[0])
    return train, None if splits[1] is None else ClassFolders(splits[1], train.class_names)


def _refuse_mixed(root: Path, splits: Sequence[str]) -> None:
    """Refuse a directory in which, for instance, `train` may be a split or a class of trains with subfolders."""
    known = {name for names in SPLITS for name in names}
    classes = [name for name in _folders(root) if name not in known and _has_photos(root / name)]
    if classes:
        raise InputError(
            f"{root} has the folder {splits[0]!r}, which has folders of its own, beside photos in {classes[0]!r}: if "
            f"{splits[0]!r} is a class, put its photos right into it; if it is a split, move the others out"
        )


def _has_photos(folder: Path) -> bool:
    endings = timm.data.get_img_extensions()
    return any(path.suffix.lower() in endings for path in folder.rglob("*"))


def _is_split(folder: Path) -> bool:
    """Whether a folder has folders and no photos of its own; otherwise it is a class, for instance of trains."""
    endings = timm.data.get_img_extensions()
    return folder.is_dir() and bool(_folders(folder)) and not any(p.suffix.lower() in endings for p in folder.iterdir())


def _folders(root: Path) -> list[str]:
    """Names of the visible folders in timm's order."""
    try:
        names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    except OSError as error:
        raise InputError(f"cannot read {root}: {error.strerror}; give a directory with a folder per class") from error
    return sorted(names, key=timm.utils.natural_key)
