"""The demo: predictions, uploads, event handlers and the command, without a browser."""

import base64
import io
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import Tensor

from tests.helpers import PHOTOS, ROOT, enliven, real_image
from timm_bcos import InputError, MethodError, TargetError, attribute, explain_targets

pytest.importorskip("gradio")

from timm_bcos.demo import components, inference
from timm_bcos.demo.app import build_app, demo_models, serving
from timm_bcos.demo.components import figures_html, file_url, notice
from timm_bcos.demo.handlers import NO_PHOTO, Handlers
from timm_bcos.demo.inference import (
    DemoModel,
    Figure,
    Prediction,
    attribution_map,
    embedded_models,
    explain_classes,
    predict,
    strongest_units,
)
from timm_bcos.demo.validation import decode_photo
from timm_bcos.explanation.visualization import map_to_rgba

COMMAND = "from timm_bcos.__main__ import main; main()"


@pytest.fixture(scope="module")
def models() -> list[DemoModel]:
    everyday, clothes, cifar = embedded_models()
    return [clothes, cifar, everyday]


@pytest.fixture(scope="module")
def hat(models: list[DemoModel]) -> Prediction:
    return predict(models[0], file_url(PHOTOS / "clothes" / "hat.jpg"))


def address_of(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image_file(mode: str = "RGB", size: tuple[int, int] = (40, 30), form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, form)
    return file.getvalue()


# ---- what is asked of a model -------------------------------------------------------------------------------------


def test_predictions_are_those_of_the_model(models: list[DemoModel], hat: Prediction) -> None:
    model = models[0]
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model.module), is_training=False)
    x = transform(Image.open(PHOTOS / "clothes" / "hat.jpg").convert("RGB"))[None]
    torch.testing.assert_close(hat.image, x)
    with torch.no_grad():
        assert list(hat.classes) == model.module(x)[0].argsort(descending=True)[:5].tolist()
    assert model.names[hat.classes[0]] == "hat"


def test_further_classes_are_explained_too(hat: Prediction) -> None:
    names = hat.model.names
    further = next(c for c in range(10) if c not in hat.classes)
    short, long = explain_classes(hat), explain_classes(hat, [further, hat.classes[0]])
    assert f'"name": "{names[further]}"' not in short
    assert all(long.count(f'"name": "{names[c]}"') == 1 for c in (*hat.classes, further))
    logit = explain_targets(hat.model.module, hat.image, [[further]])[0].logit.item()
    assert f'"logit": {logit}'[:16] in long


def test_too_many_classes_are_refused(hat: Prediction) -> None:
    with pytest.raises(InputError, match="12 classes are too many: choose up to 5 further ones"):
        explain_classes(hat, range(12))
    with pytest.raises(TargetError, match="10 classes"):
        explain_classes(hat, [10])


def test_other_methods_are_those_of_the_package(hat: Prediction) -> None:
    found = attribution_map(hat, hat.classes[1], "input_x_gradient")
    expected = map_to_rgba(attribute(hat.model.module, hat.image, [hat.classes[1]], "input_x_gradient"))[0, ..., :3]
    assert found.image is not None
    torch.testing.assert_close(found.image, expected)
    with pytest.raises(MethodError, match="for vision transformers"):
        attribution_map(hat, 0, "attention_rollout")


def test_the_strongest_units_are_the_strongest(models: list[DemoModel], hat: Prediction) -> None:
    outputs: list[Tensor] = []
    handle = hat.model.module.get_submodule("blocks.2").register_forward_hook(
        lambda m, a, output: outputs.append(output)
    )
    with torch.no_grad():
        hat.model.module(hat.image)
    handle.remove()
    best = outputs[0][0].flatten(1).amax(1).topk(inference.UNITS)
    pictures = strongest_units(hat, "blocks.2")
    assert [p.title for p in pictures] == [f"unit {unit}" for unit in best.indices.tolist()]
    assert [p.note for p in pictures] == [f"activation {value:.3g}" for value in best.values.tolist()]
    for picture in pictures:
        assert picture.image is not None and picture.image.shape == (160, 160, 3)
        assert picture.image.min() >= 0 and picture.image.max() <= 1
        assert (picture.image.std(-1) > 0.1).any(), "no color"


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        pytest.param("bcos_efficientnet_lite0.clothing", {}, marks=pytest.mark.slow),
        ("bcosv2_vit_tiny_patch16_224", dict(depth=2)),
        pytest.param("bcosv2_vit_tiny_patch16_224", {}, marks=pytest.mark.slow),
        ("bcos_cnn9", {}),
    ],
)
def test_every_layer_that_is_offered_can_be_explained(name: str, kwargs: dict[str, int]) -> None:
    size = timm.get_pretrained_cfg_value(name, "input_size")[-1]
    module = enliven(timm.create_model(name, **kwargs), real_image(size))
    model = DemoModel(name, module, list(map(str, range(module.num_classes))))
    assert model.layer in model.layers
    prediction = predict(model, file_url(PHOTOS / "coffee.jpg"))
    for layer in model.layers:
        assert strongest_units(prediction, layer)


def test_models_of_one_channel() -> None:
    module = enliven(timm.create_model("bcos_cnn9", in_chans=1), real_image(32)[:, :1])
    prediction = predict(DemoModel("gray", module, list("0123456789")), file_url(PHOTOS / "coffee.jpg"))
    assert prediction.image.shape == (1, 1, 32, 32)
    assert '"classes"' in explain_classes(prediction)
    assert attribution_map(prediction, 0, "bcos").image is not None
    assert strongest_units(prediction, str(prediction.model.layer))[0].image is not None


def test_models_of_other_channels_are_refused() -> None:
    with pytest.raises(InputError, match="photos have 1 or 3 channels"):
        DemoModel("four", timm.create_model("bcos_cnn9", in_chans=4).eval(), [])


# ---- uploads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_photos_of_common_formats(form: str) -> None:
    assert decode_photo(address_of(image_file(form=form))).size == (40, 30)
    assert decode_photo(address_of(image_file(form=form)), "L").mode == "L"


HOSTILE = {
    "no photo yet": [None, "", []],
    "this is not a photo": ["photo", {"path": "/etc/passwd"}, 3, "data:image/png,rawbytes", b"bytes", "file:///etc/passwd"],
    "arrived damaged": ["data:image/png;base64,????", "data:image/png;base64,abc"],
    "the image cannot be read": [
        address_of(b""), address_of(b"text"), address_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml"),
        address_of(image_file(form="EPS")), address_of(image_file(form="ICO", size=(32, 32))),
    ],
    "broken image": [address_of(image_file()[:60])],
    "too long and thin": [address_of(image_file(size=(4000, 20)))],
}  # fmt: skip


@pytest.mark.parametrize(("sentence", "address"), [(s, a) for s, addresses in HOSTILE.items() for a in addresses])
def test_hostile_uploads_get_a_sentence(models: list[DemoModel], sentence: str, address: object) -> None:
    with pytest.raises(InputError, match=sentence):
        predict(models[1], address)


def test_huge_uploads_get_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"the file has 21 MB, the limit is 20 MB"):
        decode_photo(address_of(bytes(21_000_000)))
    with pytest.raises(InputError, match=r"64 million pixels, the limit is 60 million"):
        decode_photo(address_of(image_file("1", (8000, 8000))))
    with pytest.raises(InputError, match=r"too many pixels \(.*decompression bomb"):
        decode_photo(address_of(image_file("1", (20000, 20000))))


# ---- events ---------------------------------------------------------------------------------------------------------


def progressive(more: int, behind: bytes = b"") -> bytes:
    """A JPEG whose last pass comes so many times more."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, "JPEG", progressive=True)
    data = file.getvalue()
    return data[:-2] + data[data.rfind(b"\xff\xda") : -2] * more + data[-2:] + behind


def test_a_jpeg_of_many_passes_is_refused_before_it_takes_time() -> None:
    """Each of some bytes takes as long as all of its pixels: minutes, for a file of ordinary size."""
    with pytest.raises(InputError, match="1010 scans, the limit is 50"):
        decode_photo(address_of(progressive(1000)))
    film = b"\xff\xda" * 1000  # what stands behind the picture, as the film of a moving photo, is no pass
    assert decode_photo(address_of(progressive(5, film))).getpixel((0, 0)) == (254, 0, 0)
    comment = b"\xff\xfe" + (2 + len(film)).to_bytes(2, "big") + film
    data = progressive(0)
    assert decode_photo(address_of(data[:2] + comment + data[2:])).size == (32, 32)


def test_a_photo_is_read_as_what_it_was_checked_as() -> None:
    """Formats know files by some of their bytes: these make a TIFF that Pillow by custom takes for an animation."""
    place = 0x1AF11
    tags = [(256, 3, 1, 1), (257, 3, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 8), (279, 4, 1, 1)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    header = b"II*\0" + struct.pack("<IHH", place, 7, 7) + bytes(6)  # where an animation has its width and height
    data = header.ljust(place, b"\0") + struct.pack("<H", len(tags)) + entries + bytes(4)
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "FLI", "no longer taken for another format"
    assert decode_photo(address_of(data)).size == (1, 1)


def test_an_animation_writes_no_line_into_the_log(caplog: pytest.LogCaptureFixture) -> None:
    file = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(file, "GIF", save_all=True, append_images=[Image.new("RGB", (9, 9), "blue")])
    assert decode_photo(address_of(file.getvalue())).size == (9, 9)
    assert not caplog.records


def test_a_broken_photo_empties_the_page(models: list[DemoModel]) -> None:
    message, document, prediction, *others = Handlers(models).change_photo(models[0].label, address_of(b"text"))
    assert 'role="alert"' in message and "send a JPEG" in message
    assert document == {"document": ""} and prediction is None
    assert [other for other in others if isinstance(other, str)] == ["", ""]


def test_a_photo_of_none_of_the_classes(models: list[DemoModel]) -> None:
    """The demo says so, names the best guess and its probability, and still explains it."""
    cifar = models[1]
    coffee, rocket = (file_url(PHOTOS / f"{name}.jpg") for name in ("coffee", "rocket"))
    message, document, prediction, *_ = Handlers(models).change_photo(cifar.label, coffee)
    best = cifar.module(prediction.image).sigmoid()[0].max().item()
    assert best < inference.LOW_CONFIDENCE and document["document"]
    guess = cifar.names[prediction.classes[0]]
    assert f"its best guess, {guess}, has a probability of {best:.0%}" in message and "checkerboard" in message
    message, *_ = Handlers(models).change_photo(cifar.label, rocket)
    assert message == ""


def test_what_fails_is_logged_and_shown_without_a_traceback(
    models: list[DemoModel], hat: Prediction, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("out of <memory>\nsecond line")

    monkeypatch.setattr(hat.model.explainer, "explain_targets", fail)
    with caplog.at_level(logging.ERROR):
        message, _ = Handlers(models).add_classes(hat, [0])
    assert message == notice("internal error: RuntimeError: out of <memory>")
    assert "&lt;memory&gt;" in message and "Traceback" not in message
    assert "Traceback" in caplog.text


def test_methods_come_one_after_the_other(models: list[DemoModel], hat: Prediction) -> None:
    handlers = Handlers(models)
    shown = list(handlers.compare(hat, 0, ["input_x_gradient", "lrp"]))
    assert [one.count("<figure>") for one in shown] == [1, 2, 3]
    assert shown[-1].count("<img") == 2
    assert "lrp has rules for linear layers and activations" in shown[-1]
    assert list(handlers.compare(None, 0, [])) == [handlers.show_units(None, "blocks.2")] == [notice(NO_PHOTO)]
    assert "no layer" in handlers.show_units(hat, "nowhere")


def test_an_example_gives_way_to_one_that_suits_the_model(models: list[DemoModel]) -> None:
    handlers, (clothes, cifar, _) = Handlers(models), models
    photo, more, target, layer = handlers.change_model(cifar.label, file_url(clothes.examples[1]))
    assert photo["value"] == file_url(cifar.examples[0])
    assert more["choices"] == target["choices"] == list(zip(cifar.names, range(10), strict=True))
    assert layer["value"] in cifar.layers
    photo, *_ = handlers.change_model(cifar.label, file_url(PHOTOS / "coffee.jpg"))
    assert "value" not in photo


def test_several_clients_at_once_get_what_each_gets_alone(models: list[DemoModel]) -> None:
    handlers = Handlers(models)
    asked = [(model.label, file_url(photo)) for model in models for photo in model.examples]
    alone = [handlers.change_photo(*one)[1] for one in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: handlers.change_photo(*one)[1], asked))
    assert together == alone
    assert len({one["document"] for one in alone}) == len(asked)


def test_markup_is_escaped() -> None:
    hostile = '<img src=x onerror="alert(1)">'
    shown = figures_html([Figure(hostile, None, hostile), Figure(hostile, torch.zeros(2, 2, 3), hostile)])
    assert "<img src=x" not in shown + notice(hostile) and shown.count("<img") == 1
    assert notice("") == ""


# ---- the page -------------------------------------------------------------------------------------------------------


def test_examples_come_with_the_package(models: list[DemoModel]) -> None:
    photos = [photo for model in models for photo in model.examples]
    assert len(photos) >= 6 and all(photo.stat().st_size <= 40_000 for photo in photos)
    assert {photo.parent for photo in photos} == {Path(components.__file__).parent / "examples"}
    for model in models:  # the first one, which clients see first, is seen right
        prediction = predict(model, file_url(model.examples[0]))
        assert model.names[prediction.classes[0]] in ("outwear", "cat", "Egyptian cat")


def test_the_model_that_is_asked_for_comes_first(tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"name {i}" for i in range(10)))
    asked, *embedded = demo_models("bcos_cifar_resnet20", classes=names)
    assert asked.label == "bcos_cifar_resnet20" and asked.names[3] == "name 3" and len(embedded) == 3
    assert asked.examples == [photo for model in embedded for photo in model.examples]
    best = tmp_path / "train" / "20261129-cats" / "model_best.pth.tar"
    best.parent.mkdir(parents=True)
    torch.save(asked.module.state_dict(), best)
    assert demo_models("bcos_cifar_resnet20", best)[0].label == "20261129-cats: bcos_cifar_resnet20"
    with pytest.raises(TargetError, match="bcos_cifar_resnet21"):
        demo_models("bcos_cifar_resnet21")


@pytest.fixture
def address(models: list[DemoModel]) -> Iterator[str]:
    with serving(build_app(models), free_port()) as address:
        yield address


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def status_of(request: urllib.request.Request | str) -> int:
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (urllib.error.URLError, ConnectionError):  # it hangs up while the flood still comes
        return 413


JSON = {"Content-Type": "application/json"}


def test_the_page_takes_no_files_and_no_floods(address: str) -> None:
    assert status_of(address) == 200
    assert status_of(urllib.request.Request(f"{address}gradio_api/upload", b"data", method="POST")) == 404
    assert (
        status_of(urllib.request.Request(f"{address}gradio_api/queue/join", bytes(30_000_000), JSON, method="POST"))
        == 413
    )
    assert status_of(address) == 200


def test_a_taken_port(models: list[DemoModel]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        served = serving(build_app(models), port)
        with pytest.raises(InputError, match=f"port {port} is taken: choose a free one with --port"):
            served.__enter__()


def run_command(*arguments: str, before: str = "") -> "subprocess.Popen[str]":
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", before + COMMAND, "demo", *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # background jobs ignore it, and hand that on
    )  # fmt: skip


def test_the_command_says_where_the_page_is_and_ends_with_ctrl_c() -> None:
    port = free_port()
    command = run_command("--port", str(port))
    try:
        assert command.stdout is not None
        assert command.stdout.readline() == f"the demo is at http://127.0.0.1:{port}/ (Ctrl-C ends it)\n"
        assert status_of(f"http://127.0.0.1:{port}/") == 200
        command.send_signal(signal.SIGINT)
        out, error = command.communicate(timeout=60)
    finally:
        command.kill()
    assert command.returncode == 128 + signal.SIGINT
    assert out == "" and error == "timm-bcos: stopped by SIGINT\n"


def test_without_gradio_the_command_names_the_extra() -> None:
    command = run_command(before="import sys; sys.modules['gradio'] = None\n")
    _, error = command.communicate(timeout=120)
    assert command.returncode == 2
    assert error == "timm-bcos: the demo needs Gradio: pip install 'timm_bcos[demo]'\n"
