import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

import timm_bcos
from tests.helpers import PHOTOS
from timm_bcos import BcosError, CheckpointError, Explainer, TargetError
from timm_bcos.cli.app import app
from timm_bcos.data.photos import is_own_picture, open_photo
from timm_bcos.models.class_names import class_names, find_class
from timm_bcos.models.loading import load_model
from timm_bcos.weights.readers import load_weights, read_state_dict


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A small network with ten classes."""
    path = tmp_path / "cnn9.safetensors"
    save_file(timm.create_model("bcos_cnn9").state_dict(), path)
    return path


def run(*arguments: object, command: str = "explain") -> tuple[int, str]:
    result = CliRunner().invoke(app, [command, *map(str, arguments)])
    if isinstance(result.exception, BcosError):
        return 2, str(result.exception)
    return result.exit_code, result.output


def test_explains_a_photo(weights: Path, photo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text = run(photo, "--model", "bcos_cnn9", "--checkpoint", weights, "--top", 2, "--out", out)
    assert code == 0, text
    assert str(photo) in text
    assert text.count("completeness error") == 2
    pictures = sorted(p.name for p in out.iterdir())
    assert len(pictures) == 5
    assert pictures[0] == "coffee.png"
    assert Image.open(out / pictures[1]).mode == "RGBA"
    assert Image.open(out / pictures[2]).size == Image.open(photo).size


def test_named_targets(weights: Path, photo: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]))
    arguments = (photo, "--model", "bcos_cnn9", "--checkpoint", weights, "--classes", names, "--out", tmp_path / "out")
    code, text = run(*arguments, "--target", "frog", "--target", 3)
    assert code == 0, text
    endings = [".png", "_cat.png", "_cat_overlay.jpg", "_frog.png", "_frog_overlay.jpg"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [f"coffee{end}" for end in endings]
    code, text = run(*arguments, "--target", "forg")
    assert code == 2
    assert "no class is called 'forg'; close names: frog; or give an index, 0 to 9" in text


def test_one_class_against_others(weights: Path, photo: Path, tmp_path: Path) -> None:
    """A class, the mean of two, and without a target the predicted class; a page that opens with the difference."""
    arguments = (photo, "--model", "bcos_cnn9", "--checkpoint", weights, "--out", tmp_path / "out")
    code, text = run(*arguments, "--target", 3, "--target", 4, "--versus", 5)
    assert code == 0, text
    for unit in (3, 4):
        assert re.search(rf"class {unit}, not class 5 +difference of logits +[+-][\d.]+ +completeness error", text)
    names = sorted(p.name for p in (tmp_path / "out").iterdir())
    both = [f"_class-{unit}_versus_class-5{end}" for unit in (3, 4) for end in (".png", "_overlay.jpg")]
    assert names == [f"coffee{end}" for end in [*both, "_versus_class-5.png"]]
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names}
    assert run(*arguments, "--target", 3)[0] == 0  # overwrites none of them
    assert before == {name: (tmp_path / "out" / name).read_bytes() for name in names}
    assert (tmp_path / "out" / "coffee_class-3.png").exists()
    code, text = run(*arguments, "--versus", 5, "--versus", 6)
    assert code == 0 and len(re.findall(r"class \d, not class 5 \+ class 6 +difference", text)) == 1, text
    code, text = run(*arguments, "--target", 3, "--versus", 5, "--html")
    assert code == 0 and text.count("probability") == 2, text
    page = (tmp_path / "out" / "coffee_versus_class-5.html").read_text()
    assert re.findall(r'"index": (\d+)', page) == ["3", "5"] and '"against": 1' in page
    code, text = run(*arguments, "--target", 3, "--versus", 5, "--shifts", 2)
    assert code == 0 and text.count("difference of logits") == 1, text
    code, text = run(*arguments, "--target", 5, "--versus", 5)
    assert (code, text) == (2, "'class 5' is given as --target and as --versus: give two different classes")
    code, text = run(*arguments, *(part for unit in range(10) for part in ("--versus", unit)))
    assert (code, text) == (2, "--versus names all classes: leave at least one out")


def test_whole_photos_and_summaries(weights: Path, photo: Path, tmp_path: Path) -> None:
    arguments = (photo, "--model", "bcos_cnn9", "--checkpoint", weights, "--out", tmp_path / "out", "--target", 3)
    code, text = run(*arguments, "--crop", "none", "--scale", 8)
    why = Explainer("bcos_cnn9", checkpoint=weights, crop="none")(photo, 3)
    padding = float(why.contribution_map.double().sum() - why.photo_map().sum())
    said = f"34% of the model's image is padding, which contributes {padding:+.3f} to class 3"
    assert code == 0 and said in text, text
    overlay = tmp_path / "out" / "coffee_class-3_overlay.jpg"
    coarse = overlay.read_bytes()
    assert Image.open(overlay).size == Image.open(photo).size and is_own_picture(overlay)
    assert run(*arguments, "--crop", "none", "--scale", 1)[0] == 0 and overlay.read_bytes() != coarse
    code, text = run(*arguments, "--crop", "squash")
    assert code == 0 and "the model sees all 480 × 320 pixels, resized to the shape of its image" in text, text
    code, text = run(*arguments, tmp_path / "none.jpg", "--versus", 5, "--json")
    [line] = [line for line in text.splitlines() if line.startswith("{")]
    summary = json.loads(line)
    assert code == 1 and "none.jpg: no such file" in text and "1 of 2 photos failed" in text
    assert (summary["path"], summary["target"]["index"], summary["versus"]["index"]) == (str(photo), 3, 5)
    total = summary["positive"] + summary["negative"] + summary["bias"]
    assert summary["logit"] == pytest.approx(total, abs=1e-5) and summary["photo"]["width"] == 480
    code, text = run(*arguments, "--crop", "middle")
    assert code == 2 and "middle" in text


def test_long_names_of_differences_stay_different(weights: Path, photo: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("\n".join(f"{'long' * 20} {i}" for i in range(10)))
    arguments = (photo, "--model", "bcos_cnn9", "--checkpoint", weights, "--classes", names, "--out", tmp_path / "out")
    for last in (8, 9):
        assert run(*arguments, "--target", 0, "--versus", 1, "--versus", 2, "--versus", last)[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 2 * 3


def test_directory_with_a_broken_photo(weights: Path, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    (photos / "inner").mkdir(parents=True)
    shutil.copy(PHOTOS / "coffee.jpg", photos / "cup.jpg")
    shutil.copy(PHOTOS / "rocket.jpg", photos / "inner" / "cup.jpg")
    (photos / "cut.jpg").write_bytes((PHOTOS / "coffee.jpg").read_bytes()[:9000])
    (photos / "text.png").write_text("no picture")
    (photos / "notes.txt").write_text("ignored")
    code, text = run(photos, "--model", "bcos_cnn9", "--checkpoint", weights, "--top", 1, "--out", tmp_path / "out")
    assert code == 1
    assert "cut.jpg: broken image" in text
    assert "text.png: not an image" in text
    assert "2 of 4 photos failed" in text
    assert {p.name for p in (tmp_path / "out").iterdir() if "_class" not in p.name} == {"cup.png", "cup_2.png"}


def test_missing_photo_and_empty_directory(weights: Path, tmp_path: Path) -> None:
    common = ("--model", "bcos_cnn9", "--checkpoint", weights, "--out", tmp_path / "out")
    code, text = run(tmp_path / "none.jpg", *common)
    assert code == 1
    assert "none.jpg: no such file" in text
    (tmp_path / "empty").mkdir()
    code, text = run(tmp_path / "empty", *common)
    assert code == 2
    assert "no photos in" in text
    assert not (tmp_path / "out").exists()


def test_models() -> None:
    with pytest.raises(TargetError, match=r"no model 'resnet_50'; close names: .*resnet50"):
        load_model("resnet_50")
    with pytest.raises(CheckpointError, match=r"no weights for bcos_resnet18: .*--checkpoint"):
        load_model("bcos_resnet18")


def test_checkpoints_of_plain_and_finetuned_networks(tmp_path: Path) -> None:
    x = torch.rand(1, 3, 64, 64)
    plain = timm.create_model("resnet18", num_classes=7).eval()
    torch.save(
        {"arch": "resnet18", "epoch": 3, "state_dict": {f"module.{k}": v for k, v in plain.state_dict().items()}},
        tmp_path / "plain.pth.tar",
    )
    from_plain = load_model("resnet18", tmp_path / "plain.pth.tar").eval()
    expected = timm_bcos.bcosify(plain, timm_bcos.BcosConfig.finetune(b=1, bias=True))(x)
    torch.testing.assert_close(from_plain(x), expected)
    finetuned = timm.create_model("bcos_resnet18", num_classes=3)
    torch.save(finetuned.state_dict(), tmp_path / "own.pth")
    assert load_model("bcos_resnet18", tmp_path / "own.pth").num_classes == 3


def test_plain_weights_of_other_sizes_are_not_stretched_to_fit(tmp_path: Path) -> None:
    model = timm.create_model("bcosify", arch="resnet18", num_classes=6, b=1, bias=True)
    torch.save(timm.create_model("resnet18", num_classes=3).state_dict(), tmp_path / "three.pth")
    with pytest.raises(CheckpointError, match=r"'fc.weight' of shape \(3, .* needs \(6, 512, 1, 1\)"):
        load_weights(model, tmp_path / "three.pth")


class Payload:
    """A pickle that would run code."""

    def __reduce__(self) -> tuple:
        return Path.touch, (Path("executed"),)


def test_bad_checkpoints(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("bcos_cnn9")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:5000])
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "empty.pth").touch()
    torch.save({1: torch.zeros(1)}, tmp_path / "numbers.pth")
    legacy = io.BytesIO()
    torch.save(model.state_dict(), legacy, _use_new_zipfile_serialization=False)
    torch.save({"payload": Payload()}, tmp_path / "evil.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    other = timm.create_model("bcos_cnn9", num_classes=4).state_dict()
    save_file(other, tmp_path / "other.safetensors")
    save_file({k: v for k, v in other.items() if k != "features.3.weight"}, tmp_path / "missing.safetensors")
    save_file(model.state_dict() | {"extra": torch.ones(1)}, tmp_path / "extra.safetensors")
    cases = {
        "none.pth": "no checkpoint at",
        "cut.safetensors": "is no safetensors file",
        "text.pth": "is no safetensors file nor PyTorch file of plain tensors",
        "evil.pth": "plain tensors",
        "empty.pth": "EOFError",
        "numbers.pth": "holds no state dict",
        "list.pth": "holds no state dict",
        "other.safetensors": r"'fc.weight' of shape \(8, 256, 1, 1\), this BcosCnn9 needs \(20, 256, 1, 1\)",
        "missing.safetensors": "has no 'features.3.weight', which this BcosCnn9 needs",
        "extra.safetensors": "has 'extra', which this BcosCnn9 does not know",
    }
    for name, text in cases.items():
        with pytest.raises(CheckpointError, match=text):
            load_weights(model, tmp_path / name)
    for length in range(1, 4000, 97):
        (tmp_path / "legacy.pth").write_bytes(legacy.getvalue()[:length])
        with pytest.raises(CheckpointError, match="is no safetensors file"):
            read_state_dict(tmp_path / "legacy.pth")
    assert not (tmp_path / "executed").exists()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert set(read_state_dict(weights)) == set(before)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda w: w.fill_(torch.nan), r"'features.3.weight' with values that are not numbers \(NaN\)"),
        (lambda w: w.index_fill(0, torch.tensor([1]), torch.inf), "'features.3.weight' with infinite values"),
        (lambda w: w.to(torch.int8), r"'features.3.weight' in torch.int8, not in floating point"),
        (lambda w: w.to_sparse(), r"'features.3.weight' as a torch.sparse_coo .* tensor: save plain dense tensors"),
        (lambda w: w.to("meta"), r"'features.3.weight' as a meta tensor, without values"),
        (lambda w: torch.quantize_per_tensor(w, 0.1, 0, torch.qint8), "'features.3.weight' as a .* torch.qint8 tensor"),
        (lambda w: w[0, 0, 0, 0], "'features.3.weight' of shape "),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_of_which_no_network_makes_sense(change: Callable[[Tensor], Tensor], text: str, tmp_path: Path) -> None:
    state = timm.create_model("bcos_cnn9").state_dict()
    torch.save(state | {"features.3.weight": change(state["features.3.weight"])}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match=text):
        load_model("bcos_cnn9", tmp_path / "w.pth")


def test_averaged_weights_are_preferred_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    states = [timm.create_model("bcos_cnn9", num_classes=2).state_dict() for _ in range(2)]
    torch.save({"state_dict": states[0], "state_dict_ema": states[1]}, tmp_path / "both.pth")
    model = load_model("bcos_cnn9", tmp_path / "both.pth")
    assert torch.equal(model.fc.weight, states[1]["fc.weight"])
    assert caplog.text.count("taking its averaged (EMA) weights, 'state_dict_ema', not 'state_dict'") == 1
    torch.save({"state_dict_ema": states[1]}, tmp_path / "one.pth")
    caplog.clear()
    load_model("bcos_cnn9", tmp_path / "one.pth")
    assert not caplog.text


def test_class_names() -> None:
    model = timm.create_model("bcos_resnet18", device="meta")
    names = class_names(model)
    assert (names[967], len(names)) == ("espresso", 1000)
    assert find_class("967", names, 1000) == find_class("Espresso", names, 1000) == 967
    with pytest.raises(TargetError, match="several classes match 'shark'"):
        find_class("shark", names, 1000)
    with pytest.raises(TargetError, match="class 1000: the model has 1000 classes"):
        find_class("1000", names, 1000)


def test_photos_are_turned_upright(tmp_path: Path) -> None:
    image = Image.new("L", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_photo(tmp_path / "turned.jpg").size == (2, 4)
    assert open_photo(tmp_path / "turned.jpg").mode == "RGB"


def test_check_prints_the_verdict(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, text = run("--model", "test_resnet", "--size", 64, command="check")
    assert code == 0, text
    assert "test_resnet: exact in float64, image of 64 pixels" in text
    code, text = run("--model", "bcos_cnn9", "--checkpoint", weights, command="check")
    assert code in (0, 1) and "completeness error" in text
    for typo, name in {"test_resnot": "test_resnet", "bcos_resnet999": "bcos_resnet"}.items():
        assert f"close names: {name}" in run("--model", typo, command="check")[1]

    def spoiled(name: str, conversion: dict[str, object]) -> torch.nn.Module:
        model = timm.create_model("bcosify", arch=name, **conversion)
        model.layer2.register_forward_hook(
            lambda module, args, output: torch.fake_quantize_per_tensor_affine(output, 0.1, 0, 0, 9)
        )
        return model

    monkeypatch.setattr("timm_bcos.models.loading.create_model", spoiled)
    code, text = run("--model", "test_resnet", "--size", 64, command="check")
    assert code == 1 and "not exact" in text and "breaks at           layer2" in text
    assert (
        "violation           layer2: fake_quantize_per_tensor_affine is not known to be linear; say what it is with "
        "timm_bcos.register_function" in text
    )
