"""Weight files from the network: fetched once into the cache, and verified there."""

import logging
import re
from http.client import HTTPException
from pathlib import Path

import torch

from .._compat import private
from ..errors import CheckpointError
from ..files import first_line, sha256

__all__ = ["BY_HAND", "download"]

_logger = logging.getLogger(__name__)

HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.\w+$")
BY_HAND = "pass a file with pretrained_cfg_overlay=dict(file=PATH)"


def download(url: str | tuple[str, str], cache_dir: str | Path | None = None) -> Path:
    """Fetch a weight file into the cache, with a progress bar, unless it is there; verify it in either case.

    Args:
        url: An address whose last part names the file, or an address and a name. Ten hex digits (8 to 64) after a dash
            at the end of the name are the start of its SHA-256.
        cache_dir: None for torch's cache.

    Returns:
        Where the file is.

    Raises:
        CheckpointError: Without network, or for a file with other contents, which is removed.
    """
    address, name = (url, url.rpartition("/")[2]) if isinstance(url, str) else url
    path = Path(cache_dir or private.get_cache_dir()) / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _logger.info("Downloading %s to %s", address, path)
        try:
            torch.hub.download_url_to_file(address, str(path))
        except (OSError, ValueError, HTTPException) as error:  # urllib's errors are OSErrors
            raise CheckpointError(f"cannot download {address}: {first_line(error)}; or {BY_HAND}") from error
    _verify(path, address)
    return path


def _verify(path: Path, address: str) -> None:
    """Compare with the digits in the file's name; where there are none, tell what came."""
    found = sha256(path)
    expected = HASH_IN_NAME.search(path.name)
    if expected is None:
        _logger.warning("No hash is published for %s; the SHA-256 of %s is %s", address, path, found)
    elif not found.startswith(expected[1]):
        path.unlink()
        raise CheckpointError(
            f"{address} should have a SHA-256 that starts with {expected[1]}, the file has {found[:16]}…: it was cut "
            f"short or changed, and has been removed; try again, or {BY_HAND}"
        )
