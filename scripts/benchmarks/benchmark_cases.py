"""What is timed: models, who competes in each, what they do, and how time and memory are taken."""

import multiprocessing
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timm_bcos
from timm_bcos.conversion.converted import BcosModel
from timm_bcos.models.cifar import CHANNELS, STRIDES, Cnn9

__all__ = ["ARCHITECTURES", "CLASSES", "JOBS", "Case", "Settings", "contestants", "peak_memory", "prepare", "seconds"]

CLASSES = 16  # of one image, in the job of several classes
SINGLY = "ours, one by one"


@dataclass(frozen=True)
class Settings:
    """How everybody runs.

    Attributes:
        batch: Images.
        size: Of their sides, in pixels.
        device: Where.
        dtype: 'float32', or that of autocast.
        channels_last: The memory layout of models and images.
        compiled: Whether torch.compile makes a program of each model, but for explanations.
        classes: Of the logits; None for what the model has.
    """

    batch: int = 8
    size: int = 224
    device: str = "cpu"
    dtype: str = "float32"
    channels_last: bool = False
    compiled: bool = False
    classes: int | None = None

    def autocast(self) -> AbstractContextManager[object]:
        """For forward passes."""
        half = self.dtype != "float32"
        return torch.autocast(self.device, getattr(torch, self.dtype)) if half else nullcontext()


@dataclass
class Case:
    """One contestant, ready to run."""

    network: nn.Module
    run: Callable[[Tensor], Tensor]
    x: Tensor
    y: Tensor
    settings: Settings
    singly: bool = False


def official(name: str) -> Callable[..., nn.Module] | None:
    """The model of the PyPI package `bcos`, where that has it and is installed."""
    try:
        from bcos.models import densenet, resnet
    except ImportError:
        return None
    found: Callable[..., nn.Module] | None = getattr(resnet if "resnet" in name else densenet, name, None)
    return partial(found, in_chans=6) if found else None


class Cnn9Official(nn.Sequential):
    """The nine layers, of the package's convolutions with MaxOut 2."""

    def __init__(self) -> None:
        from bcos.modules import BcosConv2d

        inputs = (6, *CHANNELS[:-1])
        convs = [
            BcosConv2d(i, o, 3, s, padding=1, max_out=2) for i, o, s in zip(inputs, CHANNELS, STRIDES, strict=True)
        ]
        head = BcosConv2d(CHANNELS[-1], 10, 1, max_out=2)
        super().__init__(*convs, head, nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Cnn9Plain(Cnn9):
    """The nine layers with batch norm and ReLU, what one would train without B-cos."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *[nn.Sequential(conv, nn.BatchNorm2d(conv.out_channels), nn.ReLU(inplace=True)) for conv in self.features]
        )


def ours(name: str, **kwargs: int) -> nn.Module:
    """timm's model as the second paper converts it."""
    return timm_bcos.bcosify(timm.create_model(name, **kwargs), timm_bcos.BcosConfig.v2())


Builders = dict[str, Callable[..., nn.Module]]


def contestants(name: str) -> Builders:
    """Who competes in a model, the plain one first."""
    if name == "cnn9":
        return {
            "plain": Cnn9Plain,
            "bcos package": Cnn9Official,
            "ours": partial(timm.create_model, "bcos_cnn9", max_out=1),
            "ours, paper": partial(timm.create_model, "bcos_cnn9"),
        }
    found: Builders = {"plain": partial(timm.create_model, name)}
    package = official(name)
    if package is not None:
        found["bcos package"] = package
    found |= {"ours": partial(ours, name), "ours, fused": partial(ours, name), SINGLY: partial(ours, name)}
    if timm.is_model(f"bcos_{name}"):
        found["ours, paper"] = partial(timm.create_model, f"bcos_{name}")
    return found


ARCHITECTURES = ("resnet50", "densenet121", "convnext_tiny", "vit_small_patch16_224", "cnn9")


def train(case: Case) -> None:
    """Forward and backward, without the optimizer's step."""
    case.network.train()
    case.network.zero_grad(set_to_none=True)
    with case.settings.autocast():
        logits = case.run(case.x)
    F.binary_cross_entropy_with_logits(logits.float(), case.y).backward()


@torch.no_grad()
def infer(case: Case) -> None:
    """Forward."""
    case.network.eval()
    with case.settings.autocast():
        case.run(case.x)


def explain(case: Case) -> None:
    """An explanation of each image's prediction; of the plain model, the gradient of its logit."""
    case.network.eval()
    if isinstance(case.network, BcosModel):
        timm_bcos.explain(case.network, case.x)
        return
    with detached(case.network):
        leaf = case.x.clone().requires_grad_()
        torch.autograd.grad(case.network(leaf).amax(1).sum(), leaf)


def explain_classes(case: Case) -> None:
    """Explanations of 16 classes of one image."""
    case.network.eval()
    x, classes = case.x[:1], list(range(CLASSES))
    if case.singly:
        for target in classes:
            timm_bcos.explain(case.network, x, target)
    elif isinstance(case.network, BcosModel):
        timm_bcos.explain_targets(case.network, x, [classes])
    else:
        with detached(case.network):
            leaf = x.clone().requires_grad_()
            logits = case.network(leaf)[0]
            for target in classes:
                torch.autograd.grad(logits[target], leaf, retain_graph=True)


@contextmanager
def detached(network: nn.Module) -> Iterator[None]:
    """The package's explanation mode, module by module; the plain model has none and gives its gradient."""
    modules = [m for m in network.modules() if hasattr(m, "set_explanation_mode")]
    for module in modules:
        module.set_explanation_mode(True)
    yield
    for module in modules:
        module.set_explanation_mode(False)


ALL = ("plain", "bcos package", "ours", "ours, paper")
JOBS: dict[str, tuple[Callable[[Case], None], tuple[str, ...]]] = {
    "training step": (train, ALL),
    "inference": (infer, (*ALL, "ours, fused")),
    "explanation": (explain, (*ALL, "ours, fused")),
    f"{CLASSES} classes": (explain_classes, (*ALL, "ours, fused", SINGLY)),
}


def prepare(name: str, kind: str, settings: Settings) -> Case:
    """The model, images and targets of a contestant; only the package takes encoded images alone."""
    torch.manual_seed(0)
    kwargs = {} if settings.classes is None else {"num_classes": settings.classes}
    network = contestants(name)[kind](**kwargs)
    if kind == "ours, fused":
        network = timm_bcos.fuse(network.eval())
    x = torch.rand(settings.batch, 3, settings.size, settings.size)
    if kind == "bcos package":
        x = timm_bcos.encode_image(x, 3)
    layout = torch.channels_last if settings.channels_last else torch.contiguous_format
    network = network.to(settings.device, memory_format=layout)  # type: ignore[call-overload]
    x = x.to(settings.device, memory_format=layout)
    with torch.no_grad():
        outputs = network.eval()(x[:1]).shape[1]
    run = torch.compile(network) if settings.compiled else network
    y = torch.full((settings.batch, outputs), 1 / outputs, device=settings.device)
    return Case(network, run, x, y, settings, kind == SINGLY)


def seconds(job: Callable[[Case], None], case: Case) -> float:
    """Of one run: by the device's own events on a GPU."""
    if case.settings.device != "cuda":
        start = time.perf_counter()
        job(case)
        return time.perf_counter() - start
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start_event.record()
    job(case)
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def high_water_mark() -> float:
    """MiB of resident memory at its highest (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def _peak_memory(name: str, kind: str, job: str, settings: Settings) -> float:
    case = prepare(name, kind, settings)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        JOBS[job][0](case)
        return torch.cuda.max_memory_allocated() / 2**20 - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    before = high_water_mark()
    JOBS[job][0](case)
    return high_water_mark() - before


def peak_memory(name: str, kind: str, job: str, settings: Settings) -> float:
    """MiB that a first run of a job adds to a process of its own, which has built the model."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory, (name, kind, job, settings))
