"""`timm-bcos publish`, and the Space that shows a published network: its files, its upload, its page."""

import argparse
import base64
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
import typer
from huggingface_hub import ModelCard, SpaceCard, SpaceCardData, metadata_load
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner

import timm_bcos
from tests.helpers import PHOTOS, hub_server
from timm_bcos import InputError
from timm_bcos.cli.commands.publish_model import publish
from timm_bcos.hub.space import save_space

app = typer.Typer()
app.command()(publish)

needs_page = pytest.mark.skipif(
    not find_spec("gradio") or not find_spec("timm_bcos.demo"), reason="needs timm_bcos[demo]"
)


def test_the_hub_reads_a_space(tmp_path: Path) -> None:
    save_space(tmp_path, "org/show", "org/net", photos=[PHOTOS / "coffee.jpg"], title='Why: "a"?', license="mit")
    card = SpaceCard.load(tmp_path / "README.md")
    assert isinstance(card.data, SpaceCardData)
    data = metadata_load(tmp_path / "README.md")
    assert (data["title"], data["sdk"], data["app_file"], data["license"]) == ('Why: "a"?', "gradio", "app.py", "mit")
    assert data["models"] == ["org/net"]
    assert {"b-cos", "explainable-ai"} <= set(data["tags"])
    assert len(data["emoji"]) == 1
    assert data["sdk_version"] == version("gradio") if find_spec("gradio") else "sdk_version" not in data
    assert f"timm_bcos[demo]=={timm_bcos.__version__}\n" == (tmp_path / "requirements.txt").read_text()
    compile((tmp_path / "app.py").read_text(), "app.py", "exec")
    assert (tmp_path / "examples" / "00.jpg").is_file()
    save_space(tmp_path, "org/show", "org/net", requirement="timm_bcos[demo] @ git+https://example.org/repository")
    assert (tmp_path / "requirements.txt").read_text().endswith("@ git+https://example.org/repository\n")


def test_examples_are_small_and_tell_nothing_of_the_camera(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    exif[0x010F] = "a camera"
    Image.new("RGB", (3000, 1000), "red").save(tmp_path / "large.jpg", exif=exif, comment=b"a name")
    save_space(tmp_path / "space", "org/show", "org/net", photos=[tmp_path / "large.jpg"])
    with Image.open(tmp_path / "space" / "examples" / "00.jpg") as image:
        assert image.size == (341, 1024)
        assert not image.getexif()
        assert "comment" not in image.info


@pytest.mark.parametrize(
    ("repo_id", "model_id", "photo", "message"),
    [
        ("org/show", 'org/n"et', "coffee.jpg", "is not a repository ORGANIZATION/NAME"),
        ("org/show/more", "org/net", "coffee.jpg", "'org/show/more' is not a repository"),
        ("org/show", "org/net", "none.jpg", r"example photo .*none\.jpg: no such file"),
    ],
)
def test_refused_spaces_leave_nothing(repo_id: str, model_id: str, photo: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        save_space(tmp_path / "space", repo_id, model_id, photos=[PHOTOS / photo])
    assert not (tmp_path / "space").exists()


def test_the_command_writes_a_folder(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\n".join("abcdefghij"))
    result = CliRunner().invoke(app, [
        "org/name", "--model", "bcos_cifar_resnet20", "--classes", str(tmp_path / "names.txt"),
        "--photo", str(PHOTOS / "coffee.jpg"), "--photo", str(PHOTOS / "rocket.jpg"), "--description", "Told.",
        "--accuracy", "86.6", "--dataset", "CIFAR-10", "--command", "measured so", "--trained-on", "cifar10",
        "--license", "bsd-2-clause", "--note", "one", "--note", "two", "--dtype", "float16",
        "--folder", str(tmp_path / "out"), "--space",
    ])  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.output == f"wrote {tmp_path / 'out'}\n"
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert files == {
        "README.md", "bcos_timm.py", "config.json", "explanation.png", "model.safetensors", "space/README.md",
        "space/app.py", "space/requirements.txt", "space/examples/00.jpg", "space/examples/01.jpg",
    }  # fmt: skip
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.datasets, card.data.license, card.data.base_model) == (["cifar10"], "bsd-2-clause", None)
    for part in ("Told.", "86.60 % top-1 on CIFAR-10", "measured so", "one.\ntwo."):
        assert part in card.text
    assert metadata_load(tmp_path / "out" / "space" / "README.md")["license"] == "bsd-2-clause"
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    assert model.pretrained_cfg["label_names"] == list("abcdefghij")
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 700_000


def test_the_terms_of_published_weights_go_with_them(tmp_path: Path) -> None:
    weights = tmp_path / "own.safetensors"
    save_file(timm.create_model("bcos_cifar_resnet20").state_dict(), weights)
    given = {"theirs": [], "own": ["--checkpoint", str(weights), "--license", "mit"]}
    for name, more in given.items():
        folder = str(tmp_path / name)
        result = CliRunner().invoke(app, ["org/name", "--model", "bcos_cifar_resnet20", *more, "--folder", folder])
        assert result.exit_code == 0, result.output
    cards = {name: ModelCard.load(tmp_path / name / "README.md") for name in given}
    assert [cards[name].data.license for name in given] == ["bsd-2-clause", "mit"]
    assert ["Yerlan Idelbayev" in cards[name].text for name in given] == [True, False]


def test_weights_of_unknown_terms_need_a_license(tmp_path: Path) -> None:
    save_file(timm.create_model("bcos_cifar_resnet20").state_dict(), tmp_path / "own.safetensors")
    arguments = ["org/name", "--model", "bcos_cifar_resnet20", "--checkpoint", str(tmp_path / "own.safetensors")]
    result = CliRunner().invoke(app, [*arguments, "--folder", str(tmp_path / "out")])
    assert isinstance(result.exception, InputError) and "--license" in str(result.exception)
    assert not (tmp_path / "out").exists()


def test_fine_tuned_weights_keep_the_terms_of_those_they_started_from(tmp_path: Path) -> None:
    """The default's notes say that its original was trained on ImageNet, for non-commercial research only."""
    name = "bcos_cifar_resnet20"
    args = argparse.Namespace(model=name, num_classes=3, pretrained=True, bce_loss=True)
    checkpoint = tmp_path / "last.pth.tar"
    torch.save(dict(state_dict=timm.create_model(name, num_classes=3).state_dict(), args=args), checkpoint)
    folders = {"first": ["--checkpoint", str(checkpoint)], "second": ["--model", f"local-dir:{tmp_path / 'first'}"]}
    for folder, more in folders.items():
        result = CliRunner().invoke(app, ["org/name", *more, "--note", "mine", "--folder", str(tmp_path / folder)])
        assert result.exit_code == 0, result.output
        card = ModelCard.load(tmp_path / folder / "README.md")
        assert card.data.license == "bsd-2-clause"
        for part in ("Yerlan Idelbayev", "**Base model:** `bcos_cifar_resnet20.cifar10`", "\nmine."):
            assert part in card.text
        cfg = json.loads((tmp_path / folder / "config.json").read_text())["pretrained_cfg"]
        assert not {"tag", "description"} & cfg.keys() and "label_names" not in cfg


def test_the_command_takes_figures_with_what_was_measured(tmp_path: Path) -> None:
    for given, message in (
        ("--accuracy 80", "--accuracy without --dataset: name the data set"),
        ("--dataset x", "without --accuracy: give both"),
    ):
        result = CliRunner().invoke(app, ["org/name", *given.split(), "--folder", str(tmp_path / "out")])
        assert isinstance(result.exception, InputError)
        assert message in str(result.exception)


def test_the_command_publishes_a_network_and_its_space(
    hub: hub_server.Hub, python: Callable[[str], str], tmp_path: Path
) -> None:
    command = """
import typer
from timm_bcos.cli.commands.publish_model import publish
app = typer.Typer()
app.command()(publish)
app(['org/net', '--model', 'bcos_cifar_resnet20', '--photo', %r, '--private', '--space'])
"""
    output = python(command % str(PHOTOS / "coffee.jpg"))
    assert output.split()[0].startswith(f"{hub.url}/org/net/commit/"), output
    assert output.split()[1].startswith(f"{hub.url}/spaces/org/net/commit/"), output
    network, space = hub.repositories["org/net"], hub.repositories["spaces/org/net"]
    assert (network.private, space.private) == (True, True)
    assert (network.sdk, space.sdk) == (None, "gradio")
    assert sorted(space.files) == ["README.md", "app.py", "examples/00.jpg", "requirements.txt"]
    assert 'launch(model="hf-hub:org/net"' in space.files["app.py"].decode()
    load = "import timm, timm_bcos\nprint(timm.create_model('hf-hub:org/net', pretrained=True).num_classes)"
    assert python(load).strip() == "10"
    refused = """
from timm_bcos import PublishError
from timm_bcos.hub.space import publish_space
try:
    publish_space('org/other', 'org/net', token='hf_wrong')
except PublishError as error:
    print(error)
"""
    assert "cannot publish to org/other: " in python(refused)
    assert "spaces/org/other" not in hub.repositories


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@contextmanager
def running_space(folder: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of a Space's page, started as the Hub does it."""
    port = str(free_port())
    spaces = dict(SYSTEM="spaces", SPACE_ID="org/net", GRADIO_SERVER_NAME="0.0.0.0", GRADIO_SERVER_PORT=port)
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "app.py"],
        cwd=folder, env=environment | spaces, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "http://" in line:
                yield f"http://127.0.0.1:{port}"
                return
        pytest.fail("".join(lines))
    finally:
        process.terminate()
        process.communicate(timeout=30)


def ask(address: str, path: str, content: object = None) -> str:
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(f"{address}/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return response.read().decode()


def first_answer(address: str) -> str:
    """What the page says when it is opened: a browser's two requests, for the event that opening is."""
    config = json.loads(ask(address, "config"))
    values = {component["id"]: component["props"].get("value") for component in config["components"]}
    event = next(e for e in config["dependencies"] if any(kind == "load" for _, kind in e["targets"]))
    data = [values[i] for i in event["inputs"]]
    assert data[0] == "hf-hub:org/net"
    ask(address, "gradio_api/queue/join", dict(data=data, fn_index=event["id"], session_hash="s"))
    with urllib.request.urlopen(f"{address}/gradio_api/queue/data?session_hash=s", timeout=60) as events:
        return next(text for line in events if "process_completed" in (text := line.decode()))


@needs_page
def test_the_space_runs_and_answers(hub: hub_server.Hub, hub_client: dict[str, str], tmp_path: Path) -> None:
    model = timm.create_model("bcos_cnn9", num_classes=3).eval()
    timm_bcos.save_repository(model, tmp_path / "net", "org/net", label_names=["mug", "rocket", "cat"])
    hub.repositories["org/net"] = hub_server.Repository({f.name: f.read_bytes() for f in (tmp_path / "net").iterdir()})
    save_space(tmp_path / "space", "org/net", "org/net", photos=[PHOTOS / "coffee.jpg"])
    example = base64.b64encode((tmp_path / "space" / "examples" / "00.jpg").read_bytes()).decode()
    with running_space(tmp_path / "space", hub_client) as address:
        assert example in ask(address, "config")
        answer = first_answer(address)
    assert '"success":true' in answer.replace(" ", "")
    assert "rocket" in answer
