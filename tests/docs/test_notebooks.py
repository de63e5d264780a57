"""The notebooks run offline, and print the numbers that their text states."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.helpers import ROOT
from tests.helpers.notebooks import pictures, printed, read_notebook, run_notebook, start_kernel
from tests.helpers.slow import slow_but_for

NOTEBOOKS = [ROOT / "docs" / "tour.ipynb", *sorted((ROOT / "examples").glob("*.ipynb"))]


class Claim(NamedTuple):
    """A number in the text of a notebook, and where a cell prints it."""

    text: str
    printed: str  # regular expression with one group
    value: float
    tolerance: float


CLAIMS = {
    "tour": [],
    "your_photos": [
        Claim("The hat adds about 3.4", r"hat half (\S+),", 3.41, 0.1),
        Claim("the shoes subtract about 3.3", r"shoes half (\S+),", -3.29, 0.1),
        Claim("two classes about equally probable", r"hat +(\S+)\n", 0.52, 0.03),
    ],
    "right_for_the_right_reason": [
        Claim("all photos are classified correctly", r"accuracy (\S+) %", 100, 0),
        Claim("All six jackets are now classified as pants", r"jackets with a cup: (\d) of 6 correct\n", 0, 0),
        Claim("about +7", r"cup (\S+), rest", 7.0, 0.4),
        Claim("The logits fall by about 12", r"change (\S+) =", 11.6, 0.4),
        Claim("classifies all jackets correctly", r"jackets with a cup: (\d) of 6 correct, cup", 6, 0),
        Claim("the cup hardly counts", r"of 6 correct, cup (\S+)", 0.6, 0.4),
    ],
    "similar_training_photos": [
        Claim("of a cat, has 0.65", r"least similar: chelsea \d, (\S+)", 0.65, 0.02),
        Claim("the left half is more like the hat", r"left half (\S+),", 0.074, 0.02),
        Claim("the right half more like the shoes", r"right half (\S+),", -0.117, 0.02),
    ],
    "convert_your_own_model": [
        Claim("The boxes of the objects cover 17 %", r"area of the boxes (\S+)", 0.17, 0.005),
        Claim("and about 45 %", r"B = 1: (\S+),", 0.45, 0.15),
        Claim("about 75 % of the positive contributions", r"B-cos model: (\S+)", 0.75, 0.1),
    ],
    "evaluate_fairly": [
        Claim("0 is the best possible score", r"\ncenter +\S+ \(.*?\) +(\S+) \(.*?\) +1\.00", 0, 0),
        Claim("the rank correlation is 1", r"\ncenter +\S+ \(.*?\) +0\.00 \(.*?\) +(\S+) \(", 1, 0),
        Claim("0.25 is chance", r"\ncenter +(\S+) \(", 0.25, 0),
        Claim("from 0.85 to 0.96", r"\nbcos +(\S+) \(", 0.85, 0.02),
        Claim("from 0.85 to 0.96", r"\nbcos +\S+ \(.*?\) +(\S+) \(", 0.96, 0.02),
        Claim("the interval contains 0", r"scale 1 +bcos − gradcam: (\S+)", -0.02, 0.02),
        Claim("is ahead by 0.09", r"scale 8 +bcos − gradcam: (\S+)", 0.09, 0.02),
    ],
}
PICTURES = {"tour": 4}
ALWAYS = [path for path in NOTEBOOKS if path.stem in ("tour", "your_photos", "similar_training_photos")]


@pytest.fixture(scope="module")
def kernel() -> Iterator[Any]:
    with start_kernel() as found:
        yield found


@pytest.mark.parametrize("path", slow_but_for(ALWAYS, NOTEBOOKS), ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_states(path: Path, kernel: Any) -> None:
    pytest.importorskip("captum", reason="needs the extra attribution")
    notebook = run_notebook(path, kernel)
    found = printed(notebook)
    for claim in CLAIMS[path.stem]:
        match = re.search(claim.printed, found)
        assert match, f"{path.stem} does not print {claim.printed}:\n{found}"
        assert float(match[1]) == pytest.approx(claim.value, abs=claim.tolerance), claim.text
    shown = len(pictures(notebook))
    assert shown == PICTURES[path.stem] if path.stem in PICTURES else shown > 0


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_text_of_a_notebook_states_the_tested_numbers(path: Path) -> None:
    cells = read_notebook(path).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    missing = [claim.text for claim in CLAIMS[path.stem] if " ".join(claim.text.split()) not in " ".join(text.split())]
    assert not missing


@pytest.mark.parametrize("page", ["docs/examples.md", "examples/README.md"])
def test_each_example_is_listed(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    examples = [path for path in NOTEBOOKS if path.parent.name == "examples"]
    assert len(examples) == 5 and all(path.name in text for path in examples)


def test_an_error_in_a_cell_fails(tmp_path: Path, kernel: Any) -> None:
    """The runner can fail; cells of one notebook do not see names of another, and run in its folder."""
    nbformat = pytest.importorskip("nbformat", reason="needs the extra test")
    nbclient = pytest.importorskip("nbclient", reason="needs the extra test")

    def write(name: str, *sources: str) -> Path:
        cells = [nbformat.v4.new_code_cell(source) for source in sources]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / name)
        return tmp_path / name

    first = run_notebook(write("first.ipynb", "import os\nvalue = 1", "print(os.getcwd(), value)"), kernel)
    assert printed(first) == f"{tmp_path} 1\n"
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="value"):
        run_notebook(write("second.ipynb", "value"), kernel)
