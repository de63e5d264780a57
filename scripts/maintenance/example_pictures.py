"""Run the notebooks of `examples`, and write one picture of each for the documentation.

    python scripts/maintenance/example_pictures.py [NAME ...]

Needs the extra `test`. Look at the pictures before you commit them.
"""

import base64
import io
import sys
from pathlib import Path

import nbclient
import nbformat
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES, IMAGES = ROOT / "examples", ROOT / "docs" / "images"
CHOSEN = {  # which of the pictures that a notebook shows
    "your_photos": 0,
    "right_for_the_right_reason": -1,
    "similar_training_photos": -1,
    "convert_your_own_model": -1,
    "evaluate_fairly": -1,
}
WIDTH = 1000  # pixels


def pictures(path: Path) -> list[bytes]:
    """The PNG files that the cells of a notebook show."""
    notebook = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(notebook, timeout=600, resources=dict(metadata=dict(path=str(path.parent)))).execute()
    data = (output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))
    return [base64.b64decode(one["image/png"]) for one in data if "image/png" in one]


def main() -> None:
    for name in sys.argv[1:] or CHOSEN:
        image = Image.open(io.BytesIO(pictures(EXAMPLES / f"{name}.ipynb")[CHOSEN[name]])).convert("RGB")
        image.thumbnail((WIDTH, WIDTH))
        image.save(IMAGES / f"example_{name}.webp", quality=80, method=6)


if __name__ == "__main__":
    main()
