"""A running demo and a client without a browser."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import load_script

load = load_script("demo_load")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of all temporary files."""
    return tmp_path_factory.mktemp("temporary")


@pytest.fixture(scope="module")
def app(folder: Path) -> Iterator[Any]:
    from timm_bcos.demo.app import build_app
    from timm_bcos.demo.inference import embedded_models

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(folder))
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "gradio"))
        yield build_app(embedded_models()[1:])


@pytest.fixture(scope="module")
def port(app: Any) -> Iterator[int]:
    from timm_bcos.demo.app import serving

    port = load.free_port()
    with serving(app, port):
        yield port


@pytest.fixture
def client(port: int) -> Any:
    return load.Client(port)
