"""Explaining photos: what comes out is what explain gives for the transformed photo, with names and geometry."""

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

import timm_bcos
from tests.helpers import PHOTOS, enliven, real_image
from timm_bcos import CheckpointError, Explainer, InputError, ModelStateError, TargetError
from timm_bcos.explainer import PreparedPhotos
from timm_bcos.weights.catalog import CIFAR10

CUP, CAT = PHOTOS / "coffee.jpg", PHOTOS / "chelsea.jpg"


@functools.cache
def explainer() -> Explainer:
    return Explainer("bcos_cifar_resnet20")


def transformed(path: Path) -> Tensor:
    """As timm does it."""
    cfg = timm.data.resolve_model_data_config(explainer().model)
    return timm.data.create_transform(**cfg)(Image.open(path).convert("RGB"))[None]


def assert_same(one: timm_bcos.Explanation, other: timm_bcos.Explanation) -> None:
    for name in ("logits", "target", "weights", "inputs", "bias", "logit"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", [None, 3, "cat", "CAT", ["cat", "ship"], [3, 8], {"cat", "dog"}, torch.arange(10.0)])
def test_the_same_as_explaining_transformed_photos(target: object) -> None:
    found = explainer()([CAT, CUP], target)
    index = {name: i for i, name in enumerate(CIFAR10)}
    if isinstance(target, list | set):
        target = type(target)(index.get(one, one) for one in target)
    elif isinstance(target, str):
        target = index[target.lower()]
    x = torch.cat([transformed(CAT), transformed(CUP)])
    assert_same(found, timm_bcos.explain(explainer().model, x, target))
    assert found.class_names == tuple(CIFAR10)
    assert [photo.name for photo in found.photos] == ["chelsea.jpg", "coffee.jpg"]
    assert found.photos[0].image.size == Image.open(CAT).size
    assert found.completeness_error.max() < 1e-5


def test_differences() -> None:
    model, x = explainer().model, transformed(CAT)
    assert_same(explainer()(CAT, "cat", versus="dog"), timm_bcos.contrast(model, x, 3, 5))
    assert_same(explainer()(CAT, "cat", versus={"dog", "frog"}), timm_bcos.contrast(model, x, {3}, {5, 6}))
    best, second = timm_bcos.explain(model, x).logits[0].topk(2).indices.tolist()
    assert int(explainer()(CAT, versus=second).target) == best
    found = explainer()(CAT, versus=best)  # the most probable other class
    assert (int(found.target), int(found.versus)) == (second, best)
    with pytest.raises(TargetError, match="versus holds all classes: leave at least one out"):
        explainer()(CAT, versus=set(range(10)))
    with pytest.raises(TargetError, match="10 classes"):
        explainer()(CAT, versus=10)


def test_several_classes_of_each_photo() -> None:
    one, two = explainer().top([CAT, CUP], 2)
    for found, path in ((one, CAT), (two, CUP)):
        expected = timm_bcos.explain_targets(explainer().model, transformed(path), top=2)
        assert_same(found, timm_bcos.Explanation.stack(expected))
        assert [photo.name for photo in found.photos] == [path.name] * 2 and found.class_names == tuple(CIFAR10)
    [named] = explainer().explain_targets(CAT, ["ship", 3])
    assert named.target.tolist() == [8, 3]
    both = explainer().explain_targets([CAT, CUP], [["cat"], ["ship"]])
    assert [int(found.target) for found in both] == [3, 8]
    with pytest.raises(TargetError, match="top=11: the model has 10 classes"):
        explainer().top(CAT, 11)


def pixels() -> np.ndarray:
    return np.asarray(Image.open(CUP).convert("RGB"))


FORMS: dict[str, Callable[[], object]] = {
    "str": lambda: str(CUP),
    "file": lambda: CUP.open("rb"),
    "Pillow": lambda: Image.open(CUP),
    "RGBA": lambda: Image.open(CUP).convert("RGBA"),
    "uint8": pixels,
    "uint16": lambda: pixels().astype(np.uint16) * 257,
    "float64": lambda: pixels() / 255,
    "RGBA array": lambda: np.dstack([pixels(), pixels()[..., :1]]),
    "tensor": lambda: torch.tensor(pixels()).movedim(2, 0),
    "float tensor": lambda: (torch.tensor(pixels()).movedim(2, 0) / 255).requires_grad_(),
    "half tensor": lambda: torch.tensor(pixels()).movedim(2, 0).to(torch.float64) / 255,
    "list": lambda: [CUP],
    "batch": lambda: pixels()[None],
    "tensor batch": lambda: torch.tensor(pixels()).movedim(2, 0)[None],
    "generator": lambda: (path for path in (CUP,)),
}


@pytest.mark.parametrize("form", FORMS)
def test_photos_in_every_form(form: str) -> None:
    torch.testing.assert_close(explainer().read(FORMS[form]()).images, transformed(CUP), rtol=0, atol=1e-6)


def test_gray_and_upright_photos(tmp_path: Path) -> None:
    gray = np.linspace(0, 255, 40 * 60).reshape(40, 60).astype(np.uint8)
    expected = explainer().read(Image.fromarray(gray)).images
    for form in (
        gray,
        gray[..., None],
        torch.tensor(gray),
        torch.tensor(gray)[None],
        gray / 255,
        Image.fromarray(gray),
    ):
        torch.testing.assert_close(explainer().read(form).images, expected, rtol=0, atol=1e-6)
    wide = Image.fromarray(gray.astype(np.uint16) * 257)
    torch.testing.assert_close(explainer().read(wide).images, expected, rtol=0, atol=1e-6)
    upright = Image.open(CUP)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    for form in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        prepared = explainer().read(form)
        torch.testing.assert_close(prepared.images, transformed(CUP))
        assert prepared.photos[0].image.size == upright.size


def test_directories(tmp_path: Path) -> None:
    for name in ("b.png", "a.jpg", "inner/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no photo")
    assert [photo.name for photo in explainer().read(tmp_path).photos] == ["a.jpg", "b.png", "c.png"]
    assert len(explainer().read([CUP, str(tmp_path)])) == 4
    (tmp_path / "d.png").write_text("no photo")
    with pytest.raises(InputError, match=r"d\.png: not an image"):
        explainer()(tmp_path)


WRONG = [
    ("https://example.org/cat.jpg", "is an address, not a file: nothing is downloaded"),
    ("data:image/png;base64,AAAA", "is an address, not a file"),
    ("", "the path is empty"),
    ("none.jpg", "none.jpg: no such file"),
    ([CUP, "none.jpg"], "none.jpg: no such file"),
    ([CUP, np.zeros((4, 4, 5))], r"photos\[1\]: an array of shape \(4, 4, 5\) is no photo"),
    (None, "cannot read a photo from NoneType: give a path, a Pillow image"),
    (3, "cannot read a photo from int"),
    ({"photo": CUP}, "cannot read a photo from dict"),
    (b"bytes", "cannot read a photo from bytes"),
    ([b"bytes"], r"photos\[0\]: cannot read a photo from bytes: wrap it in io.BytesIO"),
    ([], "no photos given"),
    ([[0.5, 0.5]], r"photos\[0\]: cannot read a photo from list"),
    (np.zeros((3, 20, 30)), r"shape \(3, 20, 30\) is no photo: arrays are \(H, W, 3\)"),
    (torch.zeros(20, 30, 3), r"shape \(20, 30, 3\) is no photo: tensors are \(3, H, W\)"),
    (np.zeros((0, 4, 3)), "is no photo"),
    (np.zeros((4, 4, 3), int), "pixels of type int64: give uint8"),
    (np.full((4, 4, 3), 255.0), r"pixels lie in \[255, 255\]: give uint8"),
    (np.full((4, 4, 3), np.nan), "pixels are NaN or infinite"),
    (np.array(3.0), "is no photo"),
    (Image.new("RGB", (0, 3)), "the photo: an image of 0 × 3 pixels is empty"),
    (Image.new("RGB", (500, 2)), "too long and thin"),
]


@pytest.mark.parametrize(("photos", "text"), WRONG, ids=[str(i) for i in range(len(WRONG))])
def test_what_is_no_photo(photos: object, text: str) -> None:
    with pytest.raises(InputError, match=text):
        explainer()(photos)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (dict(target="feline"), "no class is called 'feline'; .*give an index, 0 to 9"),
        (dict(target="kat"), "close names: cat; or give an index"),
        (dict(target=["cat", "dog"]), r"\['cat', 'dog'\] are 2 classes for 1 photos: .* explain_targets"),
        (dict(target=11), "the model has 10 classes"),
        (dict(target="cat", layer="layer3"), "'cat': the units of layer 'layer3' have no names; give an index"),
        (dict(target="cat", versus="cat"), "give two different classes"),
        (dict(layer="layer9"), "layer9"),
        (dict(position=(0, 0), region=(99, 9, 300, 99), layer="layer3"), "position or a region"),
    ],
)
def test_targets_that_do_not_exist(arguments: dict, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        explainer()(CAT, **arguments)


# Regions.


def test_a_box_in_pixels_of_the_photo() -> None:
    """320 × 320 pixels become 32 × 32."""
    x = real_image(320)
    small = explainer().read(x).images
    found = explainer()(x, 3, layer="layer2", region=(40, 80, 200, 240))
    assert_same(found, timm_bcos.explain(explainer().model, small, 3, layer="layer2", region=(4, 8, 20, 24)))
    both = explainer()([x[0], x[0]], 3, layer="layer2", region=np.array([[40, 80, 200, 240], [0, 0, 160, 320]]))
    one = timm_bcos.explain(explainer().model, small, 3, layer="layer2", region=(0, 0, 16, 32))
    torch.testing.assert_close(both.logit, torch.cat([found.logit, one.logit]))


@pytest.mark.parametrize("crop", ["center", "none", "squash"])
@pytest.mark.parametrize("box", [(2, 3, 17, 20), (0, 0, 41, 33), (20, 11, 21, 12)], ids=str)
def test_a_box_is_the_mask_of_its_pixels(crop: str, box: tuple[int, ...]) -> None:
    own = Explainer(explainer().model, crop=crop)
    left, top, right, bottom = box
    mask = np.zeros((33, 41), bool)
    mask[top:bottom, left:right] = True
    photo = Image.open(CUP).resize((41, 33))
    found, other = (own(photo, 3, layer="layer3", region=region) for region in (box, mask))
    torch.testing.assert_close(found.region, other.region, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.logit, other.logit, rtol=1e-5, atol=1e-6)


def mean_of_mask(mask: np.ndarray, box: tuple[float, ...], side: int) -> Tensor:
    """Literally: the mean of the mask over each pixel of the image, in 20 × 20 points; 0 outside of the photo."""
    means = torch.zeros(side, side, dtype=torch.float64)
    offsets = (np.arange(20) + 0.5) / 20
    for row in range(side):
        for column in range(side):
            ys = np.floor(box[1] + (row + offsets) * (box[3] - box[1]) / side).astype(int)
            xs = np.floor(box[0] + (column + offsets) * (box[2] - box[0]) / side).astype(int)
            seen = [mask[y, x] for y in ys for x in xs if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1]]
            means[row, column] = sum(seen) / 400
    return means


@pytest.mark.parametrize("crop", ["center", "none", "squash"])
def test_a_mask_of_the_photos_size(crop: str) -> None:
    own = Explainer(explainer().model, crop=crop)
    photo = Image.open(CUP).resize((50, 40))
    mask = np.zeros((40, 50), bool)
    mask[7:31, 13:32] = True
    prepared = own.read(photo)
    expected = mean_of_mask(mask, prepared.photos[0].box, 32)
    torch.testing.assert_close(prepared.photos[0].average(torch.tensor(mask), (32, 32)), expected, rtol=0, atol=0.06)
    found = own(photo, 3, layer="layer2", region=mask)
    other = timm_bcos.explain(own.model, prepared.images, 3, layer="layer2", region=expected)
    torch.testing.assert_close(found.logit, other.logit, rtol=0.02, atol=1e-3)
    for form in (torch.tensor(mask), Image.fromarray(mask), [mask], mask[None], mask.astype(float)):
        assert_same(own(photo, 3, layer="layer2", region=form), found)


@pytest.mark.parametrize(
    ("region", "text"),
    [
        ((0, 0, 5, 5), "is empty, or outside of what the model sees: left, top, right and bottom .* crop='none'"),
        ((90, 90, 60, 60), "is empty, or outside"),
        (np.zeros((320, 481), bool), "is empty, or outside"),
        (np.ones((4, 4)), r"shape \(4, 4\) for chelsea.jpg, which has 481 × 320 pixels"),
        ([(9, 9, 99, 99)] * 2, "region of 2 photos, but there are 1"),
        ("left", "a region of .* values"),
        (3, "region of no photos"),
        ((0, 0, float("nan"), 9), "is empty, or outside"),
    ],
)
def test_regions_outside_of_the_photo(region: object, text: str) -> None:
    with pytest.raises(TargetError, match=text):
        explainer()(CAT, 3, layer="layer2", region=region)


def test_targets_in_iterators() -> None:
    x = explainer().read([CAT, CUP])
    assert explainer()(x, (name for name in ("cat", "ship"))).target.tolist() == [3, 8]
    assert explainer()(x, "cat", versus=iter(["dog", "ship"])).versus.tolist() == [5, 8]
    for form in (iter([3, 8]), (name for name in ("cat", "ship")), iter([iter([3, 8])] * 1 + [["cat", "ship"]])):
        assert [one.target.tolist() for one in explainer().explain_targets(x, form)] == [[3, 8]] * 2
    with pytest.raises(TargetError, match="are 3 classes for 2 photos"):
        explainer()(x, iter([1, 2, 3]))


def test_numbers_of_classes_and_of_photos_per_pass() -> None:
    x = explainer().read([CAT, CUP])
    assert [len(one) for one in explainer().top(x, np.int64(2), chunk=np.int64(1))] == [2, 2]
    for wrong in (1.5, "2", True, None, 2.0):
        with pytest.raises(TargetError, match=f"top={wrong!r}: give the number of classes, a whole number from 1"):
            explainer().top(x, wrong)
    for wrong in (0, -1, 11):
        with pytest.raises(TargetError, match=f"top={wrong}: the model has 10 classes"):
            explainer().top(x, wrong)
    for wrong in (0, 1.5, "2", True):
        with pytest.raises(InputError, match=f"chunk={wrong!r}: give the number of images per pass"):
            explainer().top(x, chunk=wrong)


def test_layers_of_compiled_models() -> None:
    """The compiled model's own `named_modules` has the prefix."""
    compiled = torch.compile(explainer().model, backend="eager")
    x = explainer().read(CAT).images
    found = timm_bcos.explain(compiled, x, 3, layer="_orig_mod.layer2")
    assert_same(found, timm_bcos.explain(explainer().model, x, 3, layer="layer2"))
    for wrong in ("_orig_mod", "_orig_mod.layer9"):
        with pytest.raises(TargetError, match=r"is the model itself|no layer 'layer9'"):
            timm_bcos.explain(compiled, x, 3, layer=wrong)
    with pytest.raises(TargetError, match=r"no layer '_orig_mod\.layer2'"):
        timm_bcos.explain(explainer().model, x, 3, layer="_orig_mod.layer2")


# Photos.


@pytest.mark.parametrize("size", [(1, 100), (100, 1), (3, 300)])
def test_thin_photos_are_shown_whole(size: tuple[int, int]) -> None:
    own = Explainer(explainer().model, crop="none")
    prepared = own.read([Image.new("RGB", (40, 30)), Image.new("RGB", size, "red")])
    image, photo = prepared.images[1], prepared.photos[1]
    is_red = (image[0] > 0.9) & (image[1] < 0.1)
    along = is_red if size[0] > size[1] else is_red.T
    assert int(is_red.sum()) == 32 and bool(along.any(0).all())  # a line of one pixel from edge to edge
    left, top, right, bottom = photo.box
    assert (left <= 0 and right >= size[0]) and (top <= 0 and bottom >= size[1])  # all of the photo
    torch.testing.assert_close(own(prepared).completeness_error, torch.zeros(2).double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("convert", "text"),
    [
        (Tensor.to_sparse, "photos\\[1\\]: a sparse_coo tensor is no photo: give a dense tensor"),
        (lambda x: x.to("meta"), "a meta tensor is no photo"),
    ],
)
def test_tensors_without_plain_pixels(convert: Callable[[Tensor], Tensor], text: str) -> None:
    with pytest.raises(InputError, match=text):
        explainer().read([CAT, convert(torch.rand(3, 8, 8))])


@pytest.mark.parametrize("size", [64, (64, 96)])
def test_images_have_the_size_that_the_model_was_created_for(size: int | tuple[int, int]) -> None:
    height, width = (size, size) if isinstance(size, int) else size
    options = dict(depth=1, embed_dim=12, num_heads=2, num_classes=4)
    model = timm.create_model("bcosify", arch="vit_tiny_patch16_224", img_size=size, **options).eval()
    for crop in ("center", "none", "squash"):
        found = Explainer(model, crop=crop)(CAT)
        assert found.image.shape == (1, 3, height, width)
        assert found.completeness_error.max() < 1e-4


# Models.


def test_models_in_every_form(tmp_path: Path) -> None:
    model = timm.create_model("bcos_cifar_resnet20", pretrained=True).eval()
    timm_bcos.save_repository(model, tmp_path / "own", "me/own")
    expected = explainer()(CAT).logits
    trained_with = argparse.Namespace(
        model="bcos_cifar_resnet20", num_classes=10, input_size=[3, 32, 32], crop_pct=1.0, img_size=None,
        in_chans=None, interpolation="",
    )  # fmt: skip
    torch.save(dict(state_dict=model.state_dict(), args=trained_with), tmp_path / "best.pth.tar")  # as train.py does
    given = [model, f"local-dir:{tmp_path / 'own'}", tmp_path / "own", tmp_path / "best.pth.tar"]
    for one in given:
        torch.testing.assert_close(Explainer(one)(CAT).logits, expected, rtol=1e-4, atol=1e-4)
    named = Explainer("bcos_cifar_resnet20", checkpoint=tmp_path / "best.pth.tar")
    torch.testing.assert_close(named(CAT).logits, expected, rtol=1e-4, atol=1e-4)
    assert Explainer(tmp_path / "own").class_names == tuple(CIFAR10)
    assert repr(explainer()) == "Explainer(bcos_cifar_resnet20, 10 classes, crop='center')"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("bcos_cifar_resnet21",), TargetError, "close names: bcos_cifar_resnet20"),
        (("missing/best.pth.tar",), CheckpointError, "neither a checkpoint nor a directory with a config.json"),
        (("best.safetensors",), CheckpointError, "neither a checkpoint nor"),
        ((3,), InputError, "model of type int: give the name of a model"),
        ((nn.Linear(2, 2),), ModelStateError, "is no B-cos model"),
        ((timm.create_model("bcos_cnn9", device="meta").train(),), ModelStateError, "call model.eval"),
        ((timm.create_model("bcos_cnn9", in_chans=4).eval(),), InputError, "takes 4 channels, photos have 1 or 3"),
        (("bcos_cifar_resnet20", dict(crop="middle")), InputError, "choose one of center, none, squash"),
        (("bcos_cifar_resnet20", dict(device="cdua")), InputError, "no device 'cdua' here"),
        (("bcos_cifar_resnet20", dict(class_names=["a"])), InputError, "1 class names for a model of 10 classes"),
        (
            ("bcos_cifar_resnet20", dict(class_names={0: "a"})),
            InputError,
            "class_names of type dict: give a list of names",
        ),
        (("bcos_cifar_resnet20", dict(class_names="none.txt")), InputError, "no class names in none.txt"),
        (("bcos_cifar_resnet20", dict(transform=len)), InputError, "it is not known which part of a photo it shows"),
        (("bcos_cifar_resnet20", dict(transform=(), crop="none")), InputError, "leave it or the transform out"),
    ],
)
def test_models_that_cannot_be_used(arguments: tuple, error: type[Exception], text: str) -> None:
    model, *options = arguments
    with pytest.raises(error, match=text):
        Explainer(model, **(options[0] if options else {}))


class Own(nn.Module):
    """A model that timm knows nothing of."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_models_whose_classes_have_no_names() -> None:
    config = timm_bcos.BcosConfig.finetune(b=1, bias=True, mean=(0.4,) * 3, std=(0.2,) * 3)
    unknown = nn.Sequential(timm_bcos.bcosify(Own(), config)).eval()
    own = Explainer(unknown, transform=[transforms.Resize((24, 40))])
    assert own(CAT, 2).class_names == own.class_names == ()
    with pytest.raises(TargetError, match="class 'c': the model's classes have no names here; give an index"):
        own(CAT, "c")


def test_models_of_ones_own_and_other_transforms() -> None:
    config = timm_bcos.BcosConfig.finetune(b=1, bias=True, mean=(0.4,) * 3, std=(0.2,) * 3)
    model = timm_bcos.bcosify(Own(), config).eval()
    normalize = transforms.Normalize((0.4,) * 3, (0.2,) * 3)  # the model does that itself
    steps = transforms.Compose([transforms.Resize((24, 40)), transforms.ToTensor(), normalize])
    own = Explainer(model, transform=steps, class_names=list("abcd"))
    found = own([CAT, CUP], "c")
    x = torch.stack([transforms.ToTensor()(Image.open(p).convert("RGB").resize((40, 24), 2)) for p in (CAT, CUP)])
    assert_same(found, timm_bcos.explain(model, x, 2))
    assert found.photos[0].box == (0, 0, 481, 320)
    unnamed = Explainer(model, transform=steps)
    assert unnamed(CAT).class_names == tuple(f"class {i}" for i in range(4))
    with pytest.raises(TargetError, match=r"no class is called 'c'; .*give an index, 0 to 3"):
        unnamed(CAT, "c")
    with pytest.raises(InputError, match=r"different sizes, .* add a crop"):
        Explainer(model, transform=[transforms.Resize(24)])([CAT, Image.new("RGB", (50, 50))])


def test_gray_models() -> None:
    model = enliven(timm.create_model("bcos_cnn9", in_chans=1), real_image(32)[:, :1])
    found = Explainer(model)(CUP)
    assert found.inputs.shape == (1, 2, 32, 32) and found.photos[0].image.mode == "RGB"
    assert found.completeness_error.item() < 1e-5


def test_half_precision_inference_mode_and_chunks() -> None:
    half = Explainer(timm.create_model("bcos_cifar_resnet20", pretrained=True).eval().bfloat16())
    assert half(CAT).logits.dtype is torch.bfloat16
    with torch.inference_mode():
        assert explainer()(CAT).completeness_error.item() < 1e-5
    three = explainer()([CAT, CUP, CAT], chunk=2)
    torch.testing.assert_close(three.logits, explainer()([CAT, CUP, CAT], chunk=None).logits)
    with pytest.raises(InputError, match="chunk=0"):
        explainer()(CAT, chunk=0)


def test_wrapped_models() -> None:
    smooth = Explainer(timm_bcos.ShiftAveraged(explainer().model, 2).eval())
    assert smooth(CAT, "cat").class_names == tuple(CIFAR10)
    tower = explainer().model
    embeddings = tower(transformed(CUP)).detach()
    similar = Explainer(timm_bcos.ZeroShotClassifier(tower, embeddings, class_names=["a cup"]).eval())
    found = similar(CUP, "cup")
    assert found.class_names == ("a cup",) and found.completeness_error.item() < 1e-4


def test_images_without_photos() -> None:
    prepared = PreparedPhotos(transformed(CAT))
    found = explainer()(prepared, "cat", layer=None)
    assert found.photos == () and found.class_names == tuple(CIFAR10)
    assert_same(found, explainer()(CAT, "cat"))
    assert [one.photos for one in explainer().top(prepared)] == [()]


def test_contributions_return_to_the_photo() -> None:
    """The whole map arrives on the photo: all of it without padding, else all but the padding's."""
    for crop in ("center", "squash", "none"):
        found = Explainer(explainer().model, crop=crop)(CUP, "ship")
        [photo] = found.photos
        spread = photo.spread(found.contribution_map[0])
        total = (found.contribution_map[0].double() * photo.coverage(32, 32)).sum()
        torch.testing.assert_close(spread.sum(), total)
        assert spread.shape == (320, 480) and found.overlay().size == (480, 320)


def test_embedded_models_name_their_classes() -> None:
    for name in ("bcos_efficientnet_lite0.in1k", "bcos_efficientnet_lite0.clothing", "bcos_cifar_resnet20.cifar10"):
        model = timm.create_model(name, device="meta")
        assert len(model.pretrained_cfg["label_names"]) == model.num_classes
        assert name != "bcos_efficientnet_lite0.in1k" or model.pretrained_cfg["label_names"][281] == "tabby"
