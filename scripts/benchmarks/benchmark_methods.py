"""How fast the attribution methods are, beside the model's own explanation."""

import statistics
import time

import timm
import torch
from torch import Tensor, nn

import timm_bcos
from timm_bcos.attribution.registry import METHODS

__all__ = ["time_methods"]


def time_methods(name: str, batches: list[int], rounds: int) -> None:
    """Images per second of each attribution method, and its time relative to the model's own explanation.

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
