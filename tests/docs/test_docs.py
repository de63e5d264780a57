"""The documentation: it builds, its examples run, its tables are current."""

import argparse
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import pytest
import timm
from PIL import Image, ImageOps
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver

import timm_bcos
from tests.helpers import PHOTOS, ROOT, docs_runner, hub_server, load_script
from tests.helpers.docs_blocks import PROSE, Block, is_same_output, read_blocks
from tests.helpers.docs_runner import LANGUAGES
from timm_bcos import errors
from timm_bcos.weights.catalog import CLOTHES

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
BLOCKS = {page: [block for block in read_blocks(page) if block.language not in PROSE] for page in PAGES}
KNOWN = {"hat": "hat", "outwear": "jacket", "pants": "pants", "shoes": "shoes"}  # classes of the photos of clothes
COPIES = 2


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages speak of: photos, data sets of them, a checkpoint, a film, and the folders of the repository."""
    folder = tmp_path_factory.mktemp("stand_ins")
    shutil.copytree(PHOTOS, folder / "photos")
    shutil.copy(PHOTOS / "clothes" / "hat.jpg", folder / "photo.jpg")
    for name in ("scripts", "tests", "docs"):
        (folder / name).symlink_to(ROOT / name)
    for split in ("train", "validation", "test"):
        for label in CLOTHES:
            write_images(folder / "data" / "clothing" / split / label, KNOWN.get(label, "hat"))
        for label in ("cat", "dog"):
            write_images(folder / "data" / split / label, "shoes")
    for label in ("hat", "pants", "shoes"):
        write_images(folder / "my_photos" / label, label, 3)
    write_checkpoint(folder / "output" / "train" / "RUN")
    shutil.copy(folder / "output" / "train" / "RUN" / "model_best.pth.tar", folder)
    write_film(folder / "clip.mp4")
    return folder


def write_images(folder: Path, photo: str, copies: int = COPIES) -> None:
    folder.mkdir(parents=True)
    image = ImageOps.contain(Image.open(PHOTOS / "clothes" / f"{photo}.jpg").convert("RGB"), (192, 192))
    for i in range(copies):
        variant = ImageOps.mirror(image) if i % 2 else image
        ImageOps.crop(variant, 2 * i).save(folder / f"{i}.jpg")


def write_checkpoint(folder: Path) -> None:
    """As train.py writes it, of two classes."""
    folder.mkdir(parents=True)
    model = timm.create_model("bcosify", arch="test_resnet", num_classes=2)
    args = argparse.Namespace(model="bcosify", model_kwargs=dict(arch="test_resnet"), num_classes=2, in_chans=None,
                              input_size=[3, 64, 64], crop_pct=1.0, interpolation="", img_size=None)  # fmt: skip
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)
    saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(folder), recovery_dir=str(folder))
    saver.save_checkpoint(0, 50.0)


def write_film(path: Path) -> None:
    """Two frames of a photo, where PyAV is installed."""
    try:
        import av
    except ImportError:
        return
    image = Image.open(PHOTOS / "clothes" / "hat.jpg").convert("RGB").resize((160, 160))
    with av.open(str(path), "w") as film:
        stream = film.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 160
        for _ in range(2):
            film.mux(stream.encode(av.VideoFrame.from_image(image)))
        film.mux(stream.encode(None))


@pytest.fixture(scope="module")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Executor]:
    """One process for the examples of all pages; its Hub is ours, its caches are empty."""
    folder = tmp_path_factory.mktemp("interpreter")
    caches = dict(HF_HOME=str(folder / "hf"), TORCH_HOME=str(folder / "torch"), MPLBACKEND="agg")
    client = dict(HF_HUB_DISABLE_XET="1", HF_TOKEN=hub_server.TOKEN)
    others = dict(OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore")
    with hub_server.serve() as hub, pytest.MonkeyPatch.context() as patch:
        for name, value in {**caches, **client, **others, "HF_ENDPOINT": hub.url}.items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, context, docs_runner.serve_pretrained_weights, (folder,)) as process:
            yield process


@pytest.mark.parametrize("document", [page for page in PAGES if BLOCKS[page]], ids=lambda page: page.stem)
def test_every_example_runs(document: Path, stand_ins: Path, interpreter: Executor, tmp_path: Path) -> None:
    folder = tmp_path / "work"
    shutil.copytree(stand_ins, folder, symlinks=True)
    interpreter.submit(docs_runner.run_page, document, folder).result()


UNTESTED = 0  # blocks that no test can run at all


def test_every_block_is_tested_or_says_why_not() -> None:
    blocks = [block for page in PAGES for block in BLOCKS[page]]
    strange = [str(block) for block in blocks if block.language not in LANGUAGES and not block.mark]
    assert not strange, f"blocks that nothing tests: {strange}"
    assert sum(block.mark == "not tested" for block in blocks) == UNTESTED
    assert sum(block.mark == "" for block in blocks) > 3 * sum(block.mark == "parsed only" for block in blocks)


def test_blocks_that_are_wrong_fail(tmp_path: Path) -> None:
    """The runner can fail: in each language, and for output that is another."""
    wrong = {
        "python": "import timm_bcos\ntimm_bcos.no_such_name",
        "pycon": ">>> 1 + 1\n3",
        "bash": "timm-bcos explain --no-such-option photo.jpg",
        "console": "$ timm-bcos --version\ntimm-bcos no version",
    }
    for language, text in wrong.items():
        block = Block(tmp_path / "page.md", 1, language, text)
        with pytest.MonkeyPatch.context() as patch, pytest.raises((AssertionError, AttributeError)):
            patch.chdir(tmp_path)
            LANGUAGES[language](block, {})
    assert is_same_output("error 1.7e-07 of 0.955", "error 3e-08 of 0.9552")
    assert not is_same_output("hat 0.955", "hat 0.855") and not is_same_output("hat 1", "cap 1")


def test_the_site_builds(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="needs the extra docs")
    pytest.importorskip("material", reason="needs the extra docs")
    pytest.importorskip("mkdocstrings", reason="needs the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    html = (tmp_path / "site" / "index.html").read_text()
    assert "fonts.googleapis.com" not in html and (tmp_path / "site" / "images" / "clothes.webp").exists()


def test_every_public_name_is_in_the_reference() -> None:
    reference = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    named = set(re.findall(r"^::: timm_bcos\.(\w+)$", reference, re.MULTILINE)) | {"UncentredBatchNorm2d"}  # an alias
    missing = {name for name in set(timm_bcos.__all__) - named if not hasattr(errors, name)}
    assert not missing and named - {"errors"} <= set(timm_bcos.__all__)


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    targets = [part.partition(")")[0].partition("#")[0] for part in text.split("](")[1:]]
    missing = [target for target in targets if "://" not in target and not (ROOT / target).exists()]
    assert not missing


def test_the_tables_of_results_are_current() -> None:
    tables, blocks = load_script("results_tables"), load_script("markdown_blocks")
    for name, table in tables.TABLES.items():
        hint = f"run scripts/maintenance/results_tables.py --write ({name})"
        assert blocks.block(table.page, name) == tables.render(table), hint


def test_the_citation_names_this_version_and_both_papers() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {timm_bcos.__version__}\n" in text
    assert all(identifier in text for identifier in ("2205.10268", "2306.10898"))
