"""Runs notebooks, all of them in one kernel, because importing torch and timm takes seconds."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from . import ROOT

SECONDS = 300  # for a cell


@contextmanager
def start_kernel() -> Iterator[Any]:
    """A kernel that imports this checkout and downloads nothing."""
    jupyter_client = pytest.importorskip("jupyter_client", reason="needs the extra test")
    pytest.importorskip("ipykernel", reason="needs the extra test")
    manager = jupyter_client.KernelManager(kernel_name="python3")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("HF_HUB_OFFLINE", "1")
        manager.start_kernel()
    try:
        yield manager
    finally:
        manager.shutdown_kernel(now=True)


def read_notebook(path: Path) -> Any:
    """A notebook, which has to be stored without outputs."""
    nbformat = pytest.importorskip("nbformat", reason="needs the extra test")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(cell.get("outputs") for cell in notebook.cells), f"{path.name} is stored with outputs"
    return notebook


def run_notebook(path: Path, kernel: Any) -> Any:
    """Run the cells of a notebook in its folder, with an empty namespace, but for those tagged `skip-execution`.

    Args:
        path: The notebook.
        kernel: Kernel from `start_kernel`.

    Returns:
        The notebook with outputs.
    """
    nbformat = pytest.importorskip("nbformat", reason="needs the extra test")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra test")
    notebook = read_notebook(path)
    start = nbformat.v4.new_code_cell(f"%reset -sf\n%cd -q {json.dumps(str(path.parent))}")
    notebook.cells.insert(0, start)
    nbclient.NotebookClient(notebook, km=kernel, timeout=SECONDS).execute()
    del notebook.cells[0]
    return notebook


def printed(notebook: Any) -> str:
    """All that the cells of a notebook have printed."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(output["text"] for output in outputs if output.get("name") == "stdout")


def pictures(notebook: Any) -> list[str]:
    """The PNG pictures that the cells of a notebook show, in base64."""
    data = (output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    return [one["image/png"] for one in data if "image/png" in one]
