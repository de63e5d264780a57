"""timm's scripts with our networks: `timm-bcos run`, and checkpoints as timm's train.py writes them."""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.utils import CheckpointSaver
from typer.testing import CliRunner

import timm_bcos
from tests.helpers import PHOTOS, command, normalized, real_image
from timm_bcos import CheckpointError, InputError
from timm_bcos.cli.app import app
from timm_bcos.conversion.converted import BcosModel
from timm_bcos.models.class_names import read_class_names
from timm_bcos.models.loading import load_model, load_plain_model

SCRIPT = """
import sys
import timm
import neighbor
print(__name__, sys.argv, len(timm.list_models('bcos_cnn9*')), neighbor.NUMBER)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "neighbor.py").write_text("NUMBER = 7")
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def run(*command: str, **environment: str) -> str:
    result = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True, text=True, check=False
    )
    return result.stdout + result.stderr


def test_runs_a_script_with_the_networks_registered(script: Path) -> None:
    arguments = ["--model", "bcos_cnn9", "--help", "-b", "8"]
    output = run(sys.executable, "-W", "ignore", "-m", "timm_bcos", "run", str(script), *arguments)
    assert output.strip() == f"__main__ {[str(script), *arguments]} 8 7"


CHILDREN = """
import subprocess, sys, os
code = "import timm, sys; print(timm.is_model('bcos_resnet18'), sys.argv[1], 'custom' in sys.modules)"
print(subprocess.check_output([sys.executable, "-u", "-W", "ignore", "-c", code, "argument"], text=True).strip())
"""


def test_children_of_a_script_know_the_networks_too(tmp_path: Path) -> None:
    """As those of timm's bulk_runner.py; what else Python imports when it starts it still does."""
    (tmp_path / "bulk_runner.py").write_text(CHILDREN)
    own = tmp_path / "own"
    own.mkdir()
    (own / "custom.py").touch()
    (own / "sitecustomize.py").write_text("import custom")
    path = os.pathsep.join([str(own), os.environ.get("PYTHONPATH", str(PHOTOS.parent.parent))])
    script = str(tmp_path / "bulk_runner.py")
    output = run(sys.executable, "-W", "ignore", "-m", "timm_bcos", "run", script, PYTHONPATH=path)
    assert output.strip() == "True argument True"


def test_a_missing_script_is_named(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["run", str(tmp_path / "none.py")])
    assert isinstance(result.exception, InputError)
    assert "none.py" in str(result.exception)


DISTRIBUTED = """
import pathlib, sys
import timm, torch, torch.distributed as dist
from timm.task import ClassificationTask
dist.init_process_group("gloo")
torch.manual_seed(0)
model = timm.create_model("bcos_cnn9", num_classes=2)
task = ClassificationTask(model, torch.nn.CrossEntropyLoss(), device=torch.device("cpu"))
task.prepare_distributed(device_ids=[torch.device("cpu")])
x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(dist.get_rank()))
task.get_trainable_module()(x).sum().backward()
grad = model.layers[0].weight.grad if hasattr(model, "layers") else next(model.parameters()).grad
both = [torch.empty_like(grad) for _ in range(2)]
dist.all_gather(both, grad)
result = pathlib.Path(sys.argv[1]) / f"process_{dist.get_rank()}"
result.write_text(f"same gradients {torch.equal(*both)} {bool(grad.any())}")
dist.destroy_process_group()
"""


def test_trains_in_two_processes_on_the_cpu(tmp_path: Path) -> None:
    """As `torchrun -m timm_bcos run train.py` does; timm names the CPU as a device, which torch alone refuses."""
    script = tmp_path / "two.py"
    script.write_text(DISTRIBUTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    output = run(*torchrun, "-m", "timm_bcos", "run", str(script), str(tmp_path))
    found = {path.name: path.read_text() for path in tmp_path.glob("process_*")}  # their outputs may interleave
    assert found == dict.fromkeys(("process_0", "process_1"), "same gradients True True"), output


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint as train.py writes it: with its arguments and the optimizer."""
    torch.manual_seed(1)
    kwargs = dict(arch="test_resnet", logit_bias=-1.5)
    model = timm.create_model("bcosify", num_classes=4, **kwargs)
    optimizer = create_optimizer_v2(model, "adamw", lr=1e-3)
    model(real_image(64)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(model="bcosify", model_kwargs=kwargs, num_classes=4, in_chans=None,
                              input_size=[3, 64, 64], crop_pct=1.0, interpolation="", img_size=None)  # fmt: skip
    saver = CheckpointSaver(model, optimizer, args=args, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, 50.0)
    torch.save(model.eval()(real_image(64)).detach(), tmp_path / "expected.pt")
    return tmp_path / "model_best.pth.tar"


def test_training_checkpoints_describe_their_network(trained: Path) -> None:
    model = load_model(checkpoint=trained).eval()
    torch.testing.assert_close(model(real_image(64)), torch.load(trained.parent / "expected.pt"), rtol=0, atol=0)
    cfg = timm.data.resolve_model_data_config(model)
    assert (cfg["input_size"], cfg["crop_pct"], cfg["mean"]) == ((3, 64, 64), 1.0, (0.0, 0.0, 0.0))


def test_what_else_train_py_hands_to_the_network(tmp_path: Path) -> None:
    for name in ("test_resnet", "bcos_resnet18"):
        network = timm.create_model(name, num_classes=4, global_pool="max")
        arguments = dict(model=name, num_classes=4, gp="max", img_size=96, mean=[0.1] * 3, model_kwargs={})
        torch.save(
            {"state_dict": network.state_dict(), "args": argparse.Namespace(**arguments)}, tmp_path / f"{name}.pth.tar"
        )
    plain = load_plain_model(checkpoint=tmp_path / "test_resnet.pth.tar")
    assert plain.pretrained_cfg["input_size"] == (3, 96, 96)
    assert plain.pretrained_cfg["mean"] == (0.1, 0.1, 0.1)
    assert plain.global_pool.pool_type == "max"
    converted = load_model(checkpoint=tmp_path / "test_resnet.pth.tar").eval()
    x, std = real_image(96), torch.tensor(plain.pretrained_cfg["std"])[:, None, None]
    torch.testing.assert_close(converted(x), plain.eval()((x - 0.1) / std))
    own = load_model(checkpoint=tmp_path / "bcos_resnet18.pth.tar")
    assert own.pretrained_cfg["mean"] == (0.0, 0.0, 0.0)


def test_explain_takes_a_training_checkpoint(trained: Path, tmp_path: Path) -> None:
    classes = tmp_path / "classes"
    for name in ("class10", "class9", "class2", "class1"):
        (classes / name).mkdir(parents=True)
    arguments = ["--checkpoint", trained, "--classes", classes, "--top", 4, "--out", tmp_path / "out"]
    result = CliRunner().invoke(app, ["explain", str(PHOTOS / "coffee.jpg"), *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert all(name in result.output for name in ("class1 ", "class2 ", "class9 ", "class10 "))
    assert read_class_names(classes, 4) == ["class1", "class2", "class9", "class10"]


def test_checkpoints_that_do_not_say_what_they_are(trained: Path, tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    torch.save({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(lr=1.0)}, tmp_path / "others.pth")
    for name in ("weights.pth", "others.pth"):
        with pytest.raises(CheckpointError, match="--model"):
            load_model(checkpoint=tmp_path / name)
    cut = tmp_path / "cut.pth.tar"
    cut.write_bytes(trained.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"cut\.pth\.tar"):
        load_model(checkpoint=cut)
    with pytest.raises(CheckpointError, match=r"trained as bcosify, arch=test_resnet, .*, not as bcos_cnn9: leave"):
        load_model("bcos_cnn9", trained)


def test_checkpoints_are_loaded_as_what_they_were_trained_as(tmp_path: Path) -> None:
    """Another B or name may have weights of the same shapes."""
    network = timm.create_model("bcos_cnn9", num_classes=2, b=1.5).eval()
    args = argparse.Namespace(model="bcos_cnn9", num_classes=2, model_kwargs=dict(b=1.5))
    path = tmp_path / "trained.pth.tar"
    torch.save({"state_dict": network.state_dict(), "args": args}, path)
    x = real_image(32)
    for name in (None, "bcos_cnn9", "bcos_cnn9.mpi_cifar10"):
        assert torch.equal(load_model(name, path).eval()(x), network(x))
    with pytest.raises(CheckpointError, match=r"trained as bcos_cnn9, b=1.5, not as bcos_cnn9_b200: leave"):
        load_model("bcos_cnn9_b200", path)
    with pytest.raises(CheckpointError, match=r"bcos_cnn9 has B = 1.5, not 2"):
        load_model("bcos_cnn9", path, b=2.0)


@pytest.mark.parametrize(
    "arguments",
    [
        dict(model=7, num_classes=2),
        dict(model="nonsense", num_classes=2),
        dict(model="bcos_cnn9", num_classes="two"),
        dict(model="bcos_cnn9", num_classes=2, model_kwargs=[1]),
        dict(model="bcos_cnn9", num_classes=2, model_kwargs=dict(b="x")),
        dict(model="bcosify", num_classes=2, model_kwargs=dict(arch="nope")),
        dict(model="bcos_cnn9", num_classes=2, input_size=5),
    ],
)
def test_damaged_training_arguments(arguments: dict, tmp_path: Path) -> None:
    state = timm.create_model("bcos_cnn9", num_classes=2).state_dict()
    torch.save({"state_dict": state, "args": argparse.Namespace(**arguments)}, tmp_path / "w.pth.tar")
    with pytest.raises(CheckpointError, match=r"w.pth.tar: its training arguments describe no model"):
        load_model(checkpoint=tmp_path / "w.pth.tar")


def test_local_folders_of_plain_networks_are_converted(tmp_path: Path) -> None:
    plain = timm.create_model("test_resnet", num_classes=3).eval()
    timm.models.save_for_hf(plain, str(tmp_path))
    converted = load_model(f"local-dir:{tmp_path}").eval()
    assert isinstance(converted, BcosModel)
    x = real_image(64)
    torch.testing.assert_close(converted(x), plain(normalized(x, plain.pretrained_cfg)))


class Planted:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_executed(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "args": Planted(tmp_path / "executed")}, tmp_path / "evil.pth.tar")
    with pytest.raises(CheckpointError):
        load_model(checkpoint=tmp_path / "evil.pth.tar")
    with pytest.raises(CheckpointError):
        load_model("bcos_cnn9", tmp_path / "evil.pth.tar")
    assert not (tmp_path / "executed").exists()


def test_resumed_training_ends_where_the_uninterrupted_does(tmp_path: Path) -> None:
    """With timm's own saver and loader, which train.py uses."""

    def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        x = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        torch.nn.functional.softplus(model(x)).mean().backward()
        optimizer.step()

    def fresh() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(3)
        model = timm.create_model("bcosify", arch="test_resnet", num_classes=2)
        return model, create_optimizer_v2(model, "adamw", lr=1e-2)

    model, optimizer = fresh()
    step(model, optimizer, 0)
    saver = CheckpointSaver(model, optimizer, checkpoint_dir=str(tmp_path), recovery_dir=str(tmp_path))
    saver.save_checkpoint(0, 1.0)
    step(model, optimizer, 1)
    again, its_optimizer = fresh()
    timm.models.resume_checkpoint(again, str(tmp_path / "last.pth.tar"), its_optimizer)
    step(again, its_optimizer, 1)
    for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert timm_bcos.explain(again.eval(), real_image(32)).completeness_error.max() < 1e-4


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        (["--explanation-weight", "1"], [], "--kd-model-name"),
        (["--delete-cells"], ["--kd-model-name=bcos_cnn9"], "without a teacher"),
    ],
)
def test_tasks_that_the_script_would_pass_over(
    options: list[str], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('the script has run')")
    assert command("run", *options, script, *arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--delete-cells"], ["--explanation-weight", "1"]], ids=lambda option: option[0])
def test_tasks_are_for_scripts_that_train(
    option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A script that never uses the replaced task would ignore the option."""
    script = tmp_path / "validate.py"
    script.write_text("raise SystemExit('the script has run')")
    arguments = ["--kd-model-name=resnet50"] if option[0] != "--delete-cells" else []
    assert command("run", *option, script, *arguments) == 2
    said = capsys.readouterr().err
    assert f"{option[0]} is for timm's train.py" in said and "validate.py" in said
