import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hub_server
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import timm_bcos
from timm_bcos.cli.app import app
from timm_bcos.cli.exceptions import exit_status

LOADING = "timm_bcos.models.loading.load_model"  # what commands load networks by
SCRIPTS = Path(__file__).parent.parent / "scripts"
PHOTOS = SCRIPTS / "photos"


def load_script(name: str) -> ModuleType:
    """A script as a module; its folder comes last on the import path, where `coverage.py` hides no package."""
    (path,) = SCRIPTS.glob(f"*/{name}.py")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    spec = importlib.util.spec_from_file_location(f"script_{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def script_status(monkeypatch: pytest.MonkeyPatch, script: ModuleType, *arguments: object) -> int:
    """The exit status of a script."""
    monkeypatch.setattr(sys, "argv", [str(script.__file__), *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        script.main()
    return int(end.value.code or 0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def photo() -> Path:
    return PHOTOS / "coffee.jpg"


@pytest.fixture
def hub() -> Iterator[hub_server.Hub]:
    with hub_server.serve() as running:
        yield running


@pytest.fixture
def hub_client(hub: hub_server.Hub, tmp_path: Path) -> dict[str, str]:
    """The environment of a process whose Hub is ours and whose caches are empty."""
    caches = dict(HF_HOME=str(tmp_path / "hf"), TORCH_HOME=str(tmp_path / "torch"), OMP_NUM_THREADS="1")
    client = dict(HF_ENDPOINT=hub.url, HF_HUB_DISABLE_XET="1", HF_TOKEN=hub_server.TOKEN)
    return {**os.environ, "PYTHONPATH": str(SCRIPTS.parent), **caches, **client}


@pytest.fixture
def python(hub_client: dict[str, str], tmp_path: Path) -> Callable[..., str]:
    """Runs code, in `tmp_path`, in a process of its own whose Hub is ours: what it prints."""

    def run(code: str, **environment: str) -> str:
        result = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], env={**hub_client, **environment},
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return result.stdout + result.stderr

    return run


def real_image(size: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """Square crops of the repository's photos, (batch, 3, size, size) in [0, 1]."""
    crops = []
    for path in sorted(PHOTOS.glob("*.jpg"))[:batch]:
        image = Image.open(path).convert("RGB").resize((size, size))
        crops.append(torch.tensor(list(image.tobytes()), dtype=dtype).reshape(size, size, 3).permute(2, 0, 1) / 255)
    return torch.stack(crops)


def enliven(model: nn.Module, x: Tensor) -> nn.Module:
    """Give an untrained network running statistics, and logits that differ from their bias by about 1.

    Untrained B-cos networks hardly answer; sums that vanish beside the logit bias would prove nothing.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim <= 1 and "gamma" not in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return timm_bcos.calibrate(model, x)


def assert_exact(model: nn.Module, x: Tensor, tolerance: float) -> timm_bcos.Explanation:
    """Completeness, on a signal that is there, with logits that explanation mode leaves alone."""
    explanation = timm_bcos.explain(model, x)
    with torch.no_grad():
        plain = model(x)
    plain = plain[0] if isinstance(plain, tuple) else plain
    assert (explanation.logit - explanation.logit_bias).abs().min() > 1e-3
    assert explanation.completeness_error.max() <= tolerance
    torch.testing.assert_close(explanation.logits, plain, rtol=tolerance, atol=tolerance * plain.abs().max().item())
    return explanation


def normalized(x: Tensor, cfg: dict) -> Tensor:
    """As timm's transform does it for a plain network."""
    mean, std = (torch.tensor(cfg[key], dtype=x.dtype)[:, None, None] for key in ("mean", "std"))
    return (x - mean) / std


def smooth_noise(batch: int, channels: int, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return F.interpolate(torch.rand(batch, channels, 8, 8, dtype=dtype), size, mode="bilinear")


@functools.cache
def timm_vits_trace() -> bool:
    """Whether torch.fx traces timm's own vision transformers: torch 2.6 takes no proxy for `is_causal`."""
    with contextlib.suppress(TypeError):
        torch.fx.symbolic_trace(timm.create_model("vit_tiny_patch16_224"))
        return True
    return False


def command(*arguments: object) -> int:
    """The exit status of `timm-bcos`, as its entry point runs it."""
    return exit_status(lambda: app([*map(str, arguments)]))
