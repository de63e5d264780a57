"""The part of a photo that a transform shows, measured on photos whose pixels say where they are."""

import random

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import transforms as timm_transforms
from torch import Tensor
from torchvision import models, transforms
from torchvision.transforms import v2

import timm_bcos
from tests.helpers import PHOTOS
from timm_bcos.data.geometry import flatten_transform, transform_photo
from timm_bcos.data.photos import photo_steps
from timm_bcos.explanation.photo import Box


def photo_of_positions(width: int, height: int) -> Image.Image:
    """Red is the column and green the row of a pixel's center, as a share of the photo; blue is 1, unlike padding."""
    pixels = np.full((height, width, 3), 255, np.uint8)
    pixels[..., 0] = np.round(255 * (np.arange(width) + 0.5) / width)
    pixels[..., 1] = np.round(255 * (np.arange(height) + 0.5) / height)[:, None]
    return Image.fromarray(pixels)


def assert_shows(box: Box, image: Tensor, size: tuple[int, int], margin: int = 0) -> None:
    """Compare the box with the positions that the image's pixels tell, to a fraction of a pixel on average."""
    edges, inside = {0: (box[0], box[2]), 1: (box[1], box[3])}, []
    for axis, (start, end) in edges.items():
        count = image.shape[2 - axis]
        expected = start + (np.arange(count) + 0.5) * (end - start) / count
        border = margin + 2 + 2 * (end - start) / count
        inside.append((expected, (expected > border) & (expected < size[axis] - border), (end - start) / count))
    seen = image[:, inside[1][1]][:, :, inside[0][1]].numpy()
    if seen.size:
        assert seen[2].min() > 0.99, "padding within the photo"
    for axis, (expected, chosen, scale) in enumerate(inside):
        if seen.size and seen.shape[2 - axis] >= 8:
            measured = seen[axis].mean(axis=axis) * size[axis]
            assert abs((measured - expected[chosen]).mean()) < 0.3 * scale + 0.06


def check(transform: object, size: tuple[int, int], margin: int = 0) -> Box:
    photo = photo_of_positions(*size)
    image, box = transform_photo(photo, flatten_transform(transform))
    assert_shows(box, image, size, margin)
    return box


@pytest.mark.parametrize("mode", ["center", "border", "squash"])
def test_boxes_of_timms_transforms(mode: str) -> None:
    generator = random.Random(mode)
    for _ in range(25):
        size = generator.randint(40, 200), generator.randint(40, 200)
        border = generator.choice([None, None, 5])
        shape = generator.choice([64, (64, 64), (48, 80), (3, 80, 48), (33, 47), 61])
        given = dict(
            crop_mode=mode,
            crop_pct=generator.choice([0.7, 0.875, 1.0, 1.2]),
            interpolation=generator.choice(["bilinear", "bicubic"]),
            crop_border_pixels=border,
        )
        transform = timm.data.create_transform(shape, mean=(0.0,) * 3, std=(1.0,) * 3, **given)
        check(transform, size, border or 0)
        photo = Image.open(PHOTOS / "coffee.jpg").convert("RGB").resize(size)
        torch.testing.assert_close(transform_photo(photo, flatten_transform(transform))[0], transform(photo))


@pytest.mark.parametrize("library", [transforms, v2], ids=["v1", "v2"])
def test_boxes_of_torchvisions_steps(library: object) -> None:
    lib: object = library
    for size in ((97, 64), (50, 120)):
        check(lib.Compose([lib.Resize(40), lib.CenterCrop(33)]), size)
        check(lib.Compose([lib.Pad((3, 5, 7, 9)), lib.Resize((48, 31)), lib.CenterCrop((61, 20))]), size)
        check([lib.Pad(4), lib.Compose([lib.Pad([2, 6]), lib.Resize([50], max_size=70)])], size)
        check(torch.nn.Sequential(lib.CenterCrop([45])), size)
        check([transforms.ToTensor(), lib.Resize(64, antialias=True), lib.CenterCrop(64)], size)
    check([timm_transforms.ResizeKeepRatio((40, 60), longest=0.5), timm_transforms.CenterCropOrPad((50, 50))], (90, 70))


def test_boxes_by_hand() -> None:
    """Odd sizes: crops start at the even one of two halves, padding has its smaller half in front."""
    assert check(transforms.CenterCrop(5), (8, 7)) == (2.0, 1.0, 7.0, 6.0)  # 1.5 pixels are rounded to 2
    assert check(transforms.CenterCrop(5), (6, 10)) == (0.0, 2.0, 5.0, 7.0)  # 0.5 to 0, 2.5 to 2
    assert check(transforms.CenterCrop((9, 4)), (4, 6)) == (0.0, -1.0, 4.0, 8.0)
    assert check([transforms.Resize((10, 20)), transforms.CenterCrop(10)], (40, 60)) == (10.0, 0.0, 30.0, 60.0)


def test_presets_of_torchvisions_weights() -> None:
    preset = models.ResNet18_Weights.DEFAULT.transforms()
    image, box = transform_photo(photo_of_positions(300, 400), flatten_transform(preset))
    assert image.shape == (3, 224, 224)
    assert_shows(box, image, (300, 400))
    unnormalized = type(preset)(crop_size=224, resize_size=256, mean=(0.0,) * 3, std=(1.0,) * 3)
    torch.testing.assert_close(image, unnormalized(photo_of_positions(300, 400)))


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (400, 40), (64, 64)])
def test_whole_photos(size: tuple[int, int]) -> None:
    model = timm.create_model("bcos_cnn9")
    image, box = transform_photo(photo_of_positions(*size), photo_steps(model, "none"))
    longer = size.index(max(size))
    assert (box[longer], box[longer + 2]) == (0, max(size))
    assert box[0] <= 0 and box[1] <= 0 and box[2] >= size[0] and box[3] >= size[1]
    padding = 1 - min(size) / max(size)
    assert (image[2] == 128 / 255).float().mean() == pytest.approx(padding, abs=1 / 32)
    image, box = transform_photo(photo_of_positions(*size), photo_steps(model, "squash"))
    assert box == (0.0, 0.0, *size) and image[2].min() == 1


@pytest.mark.parametrize(
    "transform",
    [
        transforms.RandomResizedCrop(32),
        transforms.Compose([transforms.Resize(32), transforms.RandomHorizontalFlip()]),
        lambda photo: photo,
        transforms.Lambda(lambda photo: photo),
        timm.data.create_transform(32, is_training=True),
        None,
        "center",
    ],
)
def test_transforms_of_unknown_geometry_are_refused(transform: object) -> None:
    with pytest.raises(timm_bcos.InputError, match=r"it is not known which part of a photo it shows; give a transform"):
        flatten_transform(transform)


def test_thin_photos_keep_a_line_of_pixels() -> None:
    """300 × 3 pixels would be resized to 32 × 0.32, and rounded to none."""
    steps = photo_steps(timm.create_model("bcos_cnn9"), "none")
    image, box = transform_photo(Image.new("RGB", (300, 3), "red"), steps)
    assert int((image[1] == 0).sum()) == 32  # the others are gray
    assert box == (0, -45, 300, 51)  # 32 rows, each as high as the photo


def test_other_crops_are_refused() -> None:
    with pytest.raises(timm_bcos.InputError, match="crop='border': choose one of center, none, squash"):
        photo_steps(timm.create_model("bcos_cnn9"), "border")
