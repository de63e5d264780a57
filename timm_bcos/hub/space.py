"""Hugging Face Spaces that run `timm-bcos demo` with a published model."""

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import SpaceCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from .. import __version__
from ..data.photos import open_photo
from ..errors import InputError
from ..files import first_line
from .card import TAGS
from .repository import upload_folder

__all__ = ["publish_space", "save_space"]

EXAMPLES = "examples"
LARGEST_SIDE = 1024  # of an example photo, in pixels

README = """\
---
{metadata}
---
# {title}

Upload a photo to see the most probable classes of [{model_id}](https://huggingface.co/{model_id}), and how much each
pixel contributes to their logits. The model is a B-cos model, so its explanations are exact.
"""

APP = '''\
"""The demo `timm-bcos demo` with {model_id}."""

from pathlib import Path

from timm_bcos.demo.app import launch

photos = sorted((Path(__file__).parent / "{examples}").glob("*.jpg"))
launch(model="hf-hub:{model_id}", examples=photos)
'''


def publish_space(
    repo_id: str,
    model_id: str,
    *,
    photos: Sequence[str | PathLike[str]] = (),
    title: str | None = None,
    license: str = "apache-2.0",
    requirement: str | None = None,
    token: str | None = None,
    private: bool = False,
) -> str:
    """Publish a Space that runs the demo with a model of the Hub.

    If the model is private, set the secret `HF_TOKEN` in the Space's settings.

    Args:
        repo_id: Space 'ORGANIZATION/NAME', created if it does not exist.
        model_id: Repository 'ORGANIZATION/NAME' of the model; it may have the same name.
        photos: Example photos, as in `save_space`.
        title: Title, as in `save_space`.
        license: License, as in `save_space`.
        requirement: Requirement, as in `save_space`.
        token: Access token; None for the one that `hf auth login` stores.
        private: Create the Space as private.

    Returns:
        URL of the commit.

    Raises:
        InputError: If a photo cannot be read, or the Hub does not allow a name.
        PublishError: If the Hub cannot be reached or refuses the upload.
    """
    with TemporaryDirectory() as folder:
        save_space(folder, repo_id, model_id, photos=photos, title=title, license=license, requirement=requirement)
        return upload_folder(Path(folder), repo_id, token=token, private=private, repo_type="space", space_sdk="gradio")


def save_space(
    folder: str | PathLike[str],
    repo_id: str,
    model_id: str,
    *,
    photos: Sequence[str | PathLike[str]] = (),
    title: str | None = None,
    license: str = "apache-2.0",
    requirement: str | None = None,
) -> None:
    """Write the files that `publish_space` uploads: `README.md`, `app.py`, `requirements.txt` and example photos.

    Args:
        folder: Directory to write to; created if necessary.
        repo_id: Space 'ORGANIZATION/NAME'.
        model_id: Repository 'ORGANIZATION/NAME' of the model.
        photos: Example photos, saved at a smaller size and without metadata. Default: those of the embedded models.
        title: Title on the Hub. Default: the name of the Space.
        license: License by its name on the Hub.
        requirement: Requirement for pip. Default: this version of the package with the extra `demo`.

    Raises:
        InputError: If a photo cannot be read, or the Hub does not allow a name; the directory is then unchanged.
    """
    _refuse_no_address(repo_id, model_id)
    examples = [_example(Path(photo)) for photo in photos]
    title = title or repo_id.rpartition("/")[2]
    texts = {
        "README.md": README.format(metadata=_metadata(title, model_id, license), title=title, model_id=model_id),
        "app.py": APP.format(model_id=model_id, examples=EXAMPLES),
        "requirements.txt": (requirement or f"timm_bcos[demo]=={__version__}") + "\n",
    }
    target = Path(folder)
    (target / EXAMPLES if examples else target).mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")
    for number, example in enumerate(examples):
        example.save(target / EXAMPLES / f"{number:02d}.jpg", quality=90)


def _metadata(title: str, model_id: str, license: str) -> str:
    return SpaceCardData(
        title=title,
        emoji="🔎",
        colorFrom="red",
        colorTo="gray",
        sdk="gradio",
        sdk_version=_gradio_version(),
        python_version=f"{sys.version_info.major}.{sys.version_info.minor}",
        app_file="app.py",
        license=license,
        models=[model_id],
        tags=TAGS,
    ).to_yaml()


def _gradio_version() -> str | None:
    """The installed version; None for the Hub's default."""
    try:
        return version("gradio")
    except PackageNotFoundError:
        return None


def _example(path: Path) -> Image.Image:
    try:
        photo = open_photo(path)
    except InputError as error:
        raise InputError(f"example photo {path}: {error}") from error
    photo.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    photo.info.clear()  # Pillow would keep comments
    return photo


def _refuse_no_address(*repositories: str) -> None:
    """Check the names, which are written into `app.py`."""
    for name in repositories:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(
                f"{name!r} is not a repository ORGANIZATION/NAME of the Hub: {first_line(error)}"
            ) from error
