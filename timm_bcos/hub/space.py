"""A Hugging Face Space, the page of `timm-bcos demo` around a published network."""

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
LARGEST_SIDE = 1024  # of an example, in pixels

README = """\
---
{metadata}
---
# {title}

Upload a photo: the page shows the classes that [{model_id}](https://huggingface.co/{model_id}) sees in it, and for each
of them how much every pixel contributes to its logit. The network is a B-cos network, whose explanations are exact.
"""

APP = '''\
"""What {model_id} sees in photos: the page of `timm-bcos demo`."""

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
    """Publish a Space that explains photos by a network of the Hub.

    The network of a private repository needs the secret `HF_TOKEN` among the Space's settings.

    Args:
        repo_id: 'ORGANIZATION/NAME' of the Space; created if it does not exist.
        model_id: 'ORGANIZATION/NAME' of the network, which may be the same.
        photos: As in `save_space`.
        title: As there.
        license: As there.
        requirement: As there.
        token: Access token; None takes the one that `hf auth login` has stored.
        private: For a new Space.

    Returns:
        The address of the commit.

    Raises:
        InputError: For a photo that cannot be read, or a name that the Hub does not allow.
        PublishError: If the Hub cannot be reached or refuses.
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
    """Write what `publish_space` uploads: `README.md`, `app.py`, `requirements.txt` and example photos.

    Args:
        folder: A directory, made if need be.
        repo_id: 'ORGANIZATION/NAME' of the Space.
        model_id: 'ORGANIZATION/NAME' of the network.
        photos: Examples for visitors, made smaller and without what cameras write into files; without any the page has
            its own.
        title: Of the page on the Hub; the Space's name by default.
        license: As the Hub calls it.
        requirement: What pip installs; this version of the package with its page by default.

    Raises:
        InputError: For a photo that cannot be read, or a name that the Hub does not allow; the folder stays as it is.
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
    """The one that the page has been seen with here; without one the Hub takes its own."""
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
    """What `app.py` quotes."""
    for name in repositories:
        try:
            validate_repo_id(name)
        except HFValidationError as error:
            raise InputError(f"{name!r} is no repository of the Hub, ORGANIZATION/NAME: {first_line(error)}") from error
