"""Data sets of other types than folders: Hugging Face's, webdataset's shards, torchvision's."""

import io
import tarfile
from pathlib import Path

import pytest
import timm
from PIL import Image

from tests.helpers import command
from timm_bcos import InputError
from timm_bcos.data.datasets import image_loader, image_names, load_dataset

MODEL = "bcos_cifar_resnet20"


def picture(k: int) -> Image.Image:
    return Image.new("RGB", (32, 32), (40 * k, 200 - 30 * k, 90))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Two tar files of webdataset: images of classes 0 and 1."""
    pytest.importorskip("datasets")
    (tmp_path / "shards").mkdir()
    for label in range(2):
        with tarfile.open(tmp_path / "shards" / f"validation-000{label}.tar", "w") as tar:
            for k in range(3):
                image = io.BytesIO()
                picture(3 * label + k).save(image, "png")
                for suffix, content in (("png", image.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"image{label}{k}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return tmp_path / "shards"


def test_shards_are_read_through_hugging_face_s_datasets(shards: Path, tmp_path: Path) -> None:
    keys = dict(input_key="png", target_key="cls")
    found = load_dataset(str(tmp_path / "cache"), 10, kind=f"hfds/{shards}", **keys)
    model = timm.create_model(MODEL)
    for k, (image, label) in enumerate(map(image_loader(model, found), range(6))):
        assert label == k // 3
        assert (image[:, 16, 16] * 255).round().tolist() == [40 * k, 200 - 30 * k, 90]
    assert image_names(found) == [f"image{k // 3}{k % 3}.png" for k in range(6)]


def test_an_evaluation_of_shards_resumes(shards: Path, tmp_path: Path) -> None:
    data = [
        "--data-dir",
        tmp_path / "cache",
        "--dataset",
        f"hfds/{shards}",
        "--input-key",
        "png",
        "--target-key",
        "cls",
    ]
    options = ["--model", MODEL, "--images", 2, "--metric", "randomization", "--out", tmp_path / "out"]
    line = ["evaluate", "metrics", *data, *options]
    assert command(*line, "--method", "bcos") == 0
    assert command(*line, "--method", "gradient") == 0
    rows = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[1:3] for row in rows[1:]] == [
        ["bcos", "0"],
        ["bcos", "5"],
        ["gradient", "0"],
        ["gradient", "5"],
    ]


def test_columns_are_named(shards: Path, tmp_path: Path) -> None:
    cache, kind = str(tmp_path / "cache"), f"hfds/{shards}"
    with pytest.raises(InputError, match=r"no column 'image', only png, cls, .*--input-key"):
        load_dataset(cache, 2, kind=kind)
    with pytest.raises(InputError, match=r"no column 'label', only png, cls, .*--target-key"):
        load_dataset(cache, 2, kind=kind, input_key="png")


@pytest.mark.parametrize(
    ("kind", "advice"),
    [("wds/photos", "hfds/DIRECTORY"), ("hfids/org/photos", "hfds/NAME"), ("TFDS/mnist", "folder per class")],
)
def test_data_sets_that_are_read_in_order(kind: str, advice: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{kind}.*{advice}"):
        load_dataset(str(tmp_path), 2, kind=kind)


def test_keys_of_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--input-key"):
        load_dataset(str(tmp_path), 2, target_key="cls")


def test_labels_without_numbers() -> None:
    with pytest.raises(InputError, match=r"image 0 .* label 'cat': .*--class-map"):
        image_loader(timm.create_model(MODEL), [(picture(0), "cat")])(0)


def test_images_without_file_names() -> None:
    assert image_names([(picture(0), 0), (picture(1), 1)]) == ["0", "1"]
