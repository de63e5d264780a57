"""Time one training step, one inference and one explanation, side by side in one run.

For each architecture: timm's plain network, the PyPI package `bcos`, ours without MaxOut as that package builds it, and
the paper's with MaxOut 2. Rounds alternate between the networks, so that a slow moment of the machine hits all; each
figure is the median over the rounds, as a ratio to the plain network's. Peak memory is measured in a process of its own
per case.
"""

import argparse
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import timm_bcos
from timm_bcos.attribution.registry import METHODS
from timm_bcos.models.cnn import Cnn9

V2 = timm_bcos.BcosConfig.v2()


def official(name: str) -> nn.Module:
    import bcos.models.densenet
    import bcos.models.resnet

    module = bcos.models.resnet if "resnet" in name else bcos.models.densenet
    return getattr(module, name)(in_chans=6)


class Cnn9Official(nn.Sequential):
    """The nine layers, of the package's convolutions with MaxOut 2."""

    def __init__(self) -> None:
        from bcos.modules import BcosConv2d

        from timm_bcos.models.cnn import CHANNELS, STRIDES

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


CASES: dict[str, tuple[tuple[int, int], dict[str, Callable[[], nn.Module]]]] = {
    **{
        name: (
            (8, 224),
            {
                "plain": partial(timm.create_model, name),
                "bcos package": partial(official, name),
                "ours": lambda name=name: timm_bcos.bcosify(timm.create_model(name), V2),
                "ours, paper": partial(timm.create_model, f"bcos_{name}"),
            },
        )
        for name in ("resnet50", "densenet121")
    },
    "cnn9": (
        (64, 32),
        {
            "plain": Cnn9Plain,
            "bcos package": Cnn9Official,
            "ours": partial(timm.create_model, "bcos_cnn9", max_out=1),
            "ours, paper": partial(timm.create_model, "bcos_cnn9"),
        },
    ),
}


def train(network: nn.Module, x: Tensor, y: Tensor) -> None:
    network.train()
    network.zero_grad(set_to_none=True)
    F.binary_cross_entropy_with_logits(network(x), y).backward()


@torch.no_grad()
def infer(network: nn.Module, x: Tensor, y: Tensor) -> None:
    network.eval()
    network(x)


def explain(network: nn.Module, x: Tensor, y: Tensor) -> None:
    network.eval()
    if isinstance(network, timm_bcos.conversion.converted.BcosModel):
        timm_bcos.explain(network, x)
        return
    with detached(network):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(network(leaf).amax(1).sum(), leaf)


@contextmanager
def detached(network: nn.Module) -> Iterator[None]:
    """The package's explanation mode, module by module; the plain network has none and gives its gradient."""
    modules = [m for m in network.modules() if hasattr(m, "set_explanation_mode")]
    for module in modules:
        module.set_explanation_mode(True)
    yield
    for module in modules:
        module.set_explanation_mode(False)


JOBS = {"training step": train, "inference": infer, "explanation": explain}


def prepare(name: str, kind: str, channels_last: bool) -> tuple[nn.Module, Tensor, Tensor]:
    """The network, images and targets of a case; only the package takes encoded images alone."""
    (batch, size), builders = CASES[name]
    torch.manual_seed(0)
    network = builders[kind]()
    x = torch.rand(batch, 3, size, size)
    if kind == "bcos package":
        x = timm_bcos.encode_image(x, 3)
    if channels_last:
        network, x = network.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        outputs = network(x).shape[1]
    return network, x, torch.full((batch, outputs), 1 / outputs)


def seconds(job: Callable[..., None], case: tuple[nn.Module, Tensor, Tensor]) -> float:
    start = time.perf_counter()
    job(*case)
    return time.perf_counter() - start


def high_water_mark() -> float:
    """MiB of resident memory at its highest (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak_memory(name: str, kind: str, job: str, channels_last: bool) -> float:
    """MiB that a job adds to a process that has built the network."""
    case = prepare(name, kind, channels_last)
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    before = high_water_mark()
    JOBS[job](*case)
    return high_water_mark() - before


def memory(*args: object) -> float:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(peak_memory, args)


def time_methods(name: str, batches: list[int], rounds: int) -> None:
    """Images per second of each attribution method, and its time relative to the network's own explanation.

    Methods that take over ten times as long look at many changed copies of an image, and are timed for one batch size.
    """
    kwargs = {} if name.startswith("bcos") else dict(arch=name)
    network = timm.create_model("bcosify" if kwargs else name, **kwargs).eval()
    images = torch.rand(max(batches), *network.pretrained_cfg["input_size"])
    own: dict[int, float] = {}
    threads = torch.get_num_threads()
    print(
        f"\n{name}, {images.shape[-1]}², {threads} threads: images per second, and time relative to the own explanation"
    )
    for method in ("bcos", *(m for m in METHODS if m != "bcos")):
        print(f"  {method:<18}", end="", flush=True)
        for size in batches:
            try:
                times = [_time_method(network, images[:size], method) for _ in range(rounds + 1)][1:]
            except timm_bcos.MethodError as error:
                print(f" {error}", end="")
                break
            median = statistics.median(times)
            relative = median / own.setdefault(size, median)
            print(f" batch {size}: {size / median:7.2f}/s {relative:7.2f}×  ", end="", flush=True)
            if relative > 10:
                break
        print()


def _time_method(network: nn.Module, x: Tensor, method: str) -> float:
    start = time.perf_counter()
    timm_bcos.attribute(network, x, 0, method)
    return time.perf_counter() - start


def main(args: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    if args.methods:
        return time_methods(args.methods, args.batches, args.rounds)
    print(
        f"torch {torch.__version__}, timm {timm.__version__}, {torch.get_num_threads()} threads, {args.rounds} rounds"
    )
    for name in args.networks:
        batch, builders = CASES[name]
        cases = {kind: prepare(name, kind, args.channels_last) for kind in builders}
        print(f"\n{name}, batch {batch[0]}, {batch[1]}²{', channels_last' if args.channels_last else ''}")
        for title, job in JOBS.items():
            times: dict[str, list[float]] = {kind: [] for kind in cases}
            for i in tqdm(range(args.rounds + 1), desc=title, leave=False):
                for kind, case in cases.items():
                    elapsed = seconds(job, case)
                    if i:  # the first round warms up
                        times[kind].append(elapsed)
            plain = statistics.median(times["plain"])
            for kind, values in times.items():
                ratio = statistics.median(values) / plain
                peak = f"  peak {memory(name, kind, title, args.channels_last):6.0f} MiB" if args.memory else ""
                print(f"  {title:<14} {kind:<13} {1e3 * statistics.median(values):8.1f} ms  {ratio:5.2f}× plain{peak}")
    return None


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=list(CASES), help=f"of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--memory", action="store_true", help="also measure peak memory")
    parser.add_argument("--methods", metavar="MODEL", help="instead: time the attribution methods on this network")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32], help="for --methods")
    main(parser.parse_args())
