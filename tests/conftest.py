import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.helpers import PHOTOS, ROOT, hub_server
from tests.helpers.memory import free_memory, has_grown, has_scripted
from tests.processes import run_python


@pytest.fixture(autouse=True)
def _each_test() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if has_scripted() or has_grown():
        free_memory()


@pytest.fixture(autouse=True, scope="module")
def _each_module() -> Iterator[None]:
    """A module's models leave nothing behind."""
    yield
    free_memory()


@pytest.fixture
def photo() -> Path:
    return PHOTOS / "coffee.jpg"


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serve() as running:
        yield running


@pytest.fixture
def hub_client(hub: hub_server.Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose Hub is ours and whose caches are empty."""
    caches = dict(HF_HOME=str(tmp_path / "hf"), TORCH_HOME=str(tmp_path / "torch"), OMP_NUM_THREADS="1")
    client = dict(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_TOKEN=hub_server.TOKEN)
    return {**os.environ, "PYTHONPATH": str(ROOT), **caches, **client}


@pytest.fixture
def python(hub_client: dict[str, str], tmp_path: Path) -> Callable[..., str]:
    """Runs code, in `tmp_path`, in a process of its own whose Hub is ours: what it prints."""
    return lambda code, **environment: run_python(code, {**hub_client, **environment}, tmp_path)[1]
