"""Convert timm's and torchvision's architectures and measure what the explanation of a real photo leaves unexplained.

One row per architecture: by default the smallest of every model file, else all below a size, or a random one per file.
torchvision's are called `torchvision/resnet18`, of the file `torchvision/resnet`.
Each is converted (B = 2, no biases), run once in training mode so that running statistics have a scale, and explained.
A second conversion (B = 1, biases kept) must give the original's logits. Rows are appended to a JSON-lines file as they
come, so an interrupted run resumes; each architecture runs in a process of its own. Ends with a page
(`scripts/benchmarks/coverage_table.py`); `--docs` puts it where it belongs.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import multiprocessing.connection
import random
import signal
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from coverage_table import DOCS, GOALS, PHOTO, TORCHVISION, Row, read, summary, write_pages
from torch import Tensor, nn
from tqdm import tqdm

import timm_bcos
from timm_bcos.nn.layers import BcosConv2d, BcosLinear
from timm_bcos.nn.module_utils import first_output

SIZES = (96, 112, 128, 160, 168)  # tried before an architecture's own input size
GAMMAS = (1.0, 8.0, 64.0)
FAINT = 1e-30  # logits that float32 hardly holds


def photo(size: int, channels: int = 3) -> Tensor:
    """(1, channels, size, size) in [0, 1], float64."""
    from PIL import Image
    from torchvision.transforms.functional import pil_to_tensor, resize

    image = pil_to_tensor(Image.open(PHOTO).convert("RGB")).double() / 255
    image = resize(image, [size, size], antialias=True).clamp(0, 1)
    return image[[i % 3 for i in range(channels)]][None]


SIZE_ARGUMENT = {"vision_transformer": "image_size"}  # of torchvision's models that are built for one size


@dataclass(frozen=True)
class Facts:
    """What a library says about an architecture.

    Attributes:
        file: Its model file.
        size: Its own image size.
        mean: Per channel, of the images that it takes.
        std: Likewise.
        size_argument: What its builder calls the image size, if it has to know it.
    """

    file: str
    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size_argument: str | None


def facts(arch: str) -> Facts:
    if not arch.startswith(TORCHVISION):
        cfg = timm.get_pretrained_cfg(arch)
        file = timm.models.model_entrypoint(arch).__module__.rpartition(".")[2]
        return Facts(file, cfg.input_size[-1], cfg.mean, cfg.std, "img_size" if cfg.fixed_input_size else None)
    name = arch.removeprefix(TORCHVISION)
    transform = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    file = torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]
    size = transform.crop_size[0]
    return Facts(TORCHVISION + file, size, tuple(transform.mean), tuple(transform.std), SIZE_ARGUMENT.get(file))


def build(arch: str, **kwargs: Any) -> nn.Module:
    if not arch.startswith(TORCHVISION):
        return timm.create_model(arch, **kwargs)
    name = arch.removeprefix(TORCHVISION)
    if name in ("googlenet", "inception_v3"):  # as with pretrained weights
        kwargs |= dict(init_weights=False, transform_input=True)
    return torchvision.models.get_model(name, weights=None, **kwargs)


def create(arch: str, size: int, **kwargs: Any) -> nn.Module:
    """An untrained plain model whose norms and scales are not at their uninformative initial values."""
    argument = facts(arch).size_argument
    torch.manual_seed(0)
    model = build(arch, **({argument: size} if argument else {}), **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim <= 1 or parameter.numel() == max(parameter.shape) or not parameter.any():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def create_small(arch: str) -> tuple[nn.Module, int]:
    """The plain model, and the smallest of a few image sizes that it takes; its own size if none."""
    own = facts(arch).size
    for size in (s for s in SIZES if s < own):
        try:
            model = create(arch, size)
            timm_bcos.calibrate(model, torch.rand(1, 3, size, size))
        except Exception:  # whatever an architecture says to a size that it does not take
            continue
        return model, size
    return create(arch, own), own


def measure(file: str, arch: str, seconds: int) -> Row:
    """Everything about one architecture; never raises."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    row, start = Row(file, arch), time.perf_counter()
    signal.signal(signal.SIGALRM, _raise_timeout)
    signal.alarm(seconds)
    try:
        _measure(row)
    except timm_bcos.UnsupportedModuleError as error:
        row.verdict = "refused: " + "; ".join(error.problems)[:300]
    except Exception as error:  # a row says what happened
        row.verdict = f"failed: {type(error).__name__}: {(str(error) or '-').splitlines()[0][:200]}"
    finally:
        signal.alarm(0)
    row.seconds = round(time.perf_counter() - start, 1)
    return row


def _raise_timeout(*_: Any) -> None:
    raise TimeoutError("took too long")


def _measure(row: Row) -> None:
    plain, row.size = create_small(row.arch)
    row.params = round(sum(p.numel() for p in plain.parameters()) / 1e6, 2)
    x = photo(row.size)
    known = facts(row.arch)
    row.preserving = preserving_error(copy.deepcopy(plain), known, x.float())
    if row.preserving > GOALS["preserving"]:
        row.preserving64 = preserving_error(copy.deepcopy(plain).double(), known, x)
    model, row.gamma = convert(plain, x.float())
    row.bcos_share = bcos_share(model)
    row.gradients = training_step(model, x.float())
    timm_bcos.calibrate(model, x.float())
    row.error32 = timm_bcos.explain(model, x.float()).completeness_error.item()
    verdict = timm_bcos.check(model.double(), x)
    row.error64, row.shift, row.image_share = verdict.completeness_error, verdict.logit_shift, verdict.image_share
    row.rounding = verdict.rounding if row.shift > verdict.tolerance else None
    row.breaks_at = verdict.breaks_at or ""
    reached = row.error64 <= GOALS["error64"] and row.error32 <= GOALS["error32"] and verdict.exact
    row.verdict = "exact" if reached else "not exact"


def convert(plain: nn.Module, x: Tensor) -> tuple[nn.Module, float]:
    """The conversion and its γ: 1, unless the untrained model's signal fades to nothing, as it does without norms."""
    for gamma in GAMMAS:
        model = timm_bcos.bcosify(copy.deepcopy(plain), timm_bcos.BcosConfig(gamma=gamma)).train()
        with torch.no_grad():  # by the statistics of a batch
            if first_output(model(torch.cat([x, x.flip(-1)]))).abs().max() > FAINT:
                break
    return model, gamma


def bcos_share(model: nn.Module) -> float:
    layers = [m for m in model.modules() if isinstance(m, BcosConv2d | BcosLinear) and m.b > 1]
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    return sum(layer.weight.numel() for layer in layers) / weights


def training_step(model: nn.Module, x: Tensor) -> str:
    """'all', or the first parameter without a finite gradient."""
    model.train()
    outputs = model(torch.cat([x, x.flip(-1)]))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    sum(nn.functional.softplus(output).mean() for output in outputs).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.isfinite().all()):
            return name
        parameter.grad = None
    return "all"


def preserving_error(plain: nn.Module, known: Facts, x: Tensor) -> float:
    """Largest relative error of the logits after a conversion with B = 1 and biases, in the dtype of x."""
    mean, std = (torch.tensor(v, dtype=x.dtype).reshape(-1, 1, 1) for v in (known.mean, known.std))
    normalized = (x - mean) / std
    timm_bcos.calibrate(plain, normalized)
    with torch.no_grad():
        expected = first_output(plain(normalized))
        model = timm_bcos.bcosify(plain, timm_bcos.BcosConfig.finetune(b=1, bias=True))
        found = first_output(model(x))
    return ((found - expected).abs().max() / expected.abs().max()).item()


def count_parameters(arch: str) -> int:
    """On the meta device where the architecture can be built there; torchvision records it with the weights."""
    if arch.startswith(TORCHVISION):
        return int(torchvision.models.get_model_weights(arch.removeprefix(TORCHVISION)).DEFAULT.meta["num_params"])
    warnings.filterwarnings("ignore")
    try:
        model = timm.create_model(arch, device="meta")
    except Exception:  # some architectures compute in their constructors
        model = timm.create_model(arch)
    return sum(p.numel() for p in model.parameters())


def all_architectures(cache: Path, jobs: int) -> dict[str, dict[str, int]]:
    """Parameters by file and architecture; counting takes minutes, so it is cached."""
    if cache.exists():
        return json.loads(cache.read_text())
    names = timm.list_models(exclude_filters=["bcos*"])
    names += [TORCHVISION + name for name in torchvision.models.list_models(module=torchvision.models)]
    found: dict[str, dict[str, int]] = defaultdict(dict)
    with ProcessPoolExecutor(jobs) as pool:
        for arch, count in zip(names, tqdm(pool.map(count_parameters, names), "count", len(names)), strict=True):
            found[facts(arch).file][arch] = count
    with timm_bcos.files.atomic_path(cache) as path:
        path.write_text(json.dumps(found, indent=1))
    return found


def choose(args: argparse.Namespace, found: dict[str, dict[str, int]]) -> list[tuple[str, str]]:
    """(file, architecture) pairs, in the order of the files."""
    rng = random.Random(args.seed)
    pairs = []
    for file, archs in sorted(found.items()):
        fitting = sorted(archs, key=lambda a: (archs[a], a))
        if args.all:
            chosen = [arch for arch in fitting if archs[arch] <= args.max_params * 1e6] or fitting[:1]
        elif args.seed is not None:
            chosen = [rng.choice([arch for arch in fitting if archs[arch] <= args.max_params * 1e6] or fitting[:1])]
        else:
            chosen = fitting[:1]
        pairs += [(file, arch) for arch in chosen if not args.names or arch in args.names or file in args.names]
    return pairs


def run(pairs: list[tuple[str, str]], path: Path, jobs: int, seconds: int) -> list[Row]:
    """Measure what the file does not have yet, appending each row as it comes."""
    rows = {row.arch: row for row in read(path)}
    todo = [pair for pair in pairs if pair[1] not in rows]
    with path.open("a") as out:
        for row in tqdm(measure_all(todo, jobs, seconds), "architectures", len(todo)):
            rows[row.arch] = row
            out.write(json.dumps(dataclasses.asdict(row)) + "\n")
            out.flush()
            if row.verdict != "exact":
                tqdm.write(f"{row.file}/{row.arch}: {row.verdict} {row.breaks_at}")
    return [rows[arch] for _, arch in pairs]


def measure_all(todo: list[tuple[str, str]], jobs: int, seconds: int) -> Iterator[Row]:
    """Rows as they come, each from a forked process: one that the system kills costs one row, and memory is freed."""
    context = multiprocessing.get_context("fork")
    running: dict[Any, tuple[Any, Row]] = {}
    waiting = list(reversed(todo))
    while waiting or running:
        while waiting and len(running) < jobs:
            receiver, sender = context.Pipe(duplex=False)
            pair = waiting.pop()
            process = context.Process(target=_send, args=(sender, *pair, seconds))
            process.start()
            sender.close()
            running[receiver] = process, Row(*pair, verdict="failed: the process was killed, probably for its memory")
        for receiver in multiprocessing.connection.wait(list(running)):
            process, row = running.pop(receiver)
            with contextlib.suppress(EOFError):
                row = receiver.recv()
            process.join()
            yield row


def _send(sender: Any, file: str, arch: str, seconds: int) -> None:
    sender.send(measure(file, arch, seconds))


def origin(arguments: list[str]) -> dict[str, str]:
    """The command, without paths of this machine, and the versions."""
    packages = (timm, torchvision, torch, timm_bcos)
    return dict(
        command=" ".join(
            ["python scripts/benchmarks/model_coverage.py", *(a for a in arguments if not a.startswith("/"))]
        ),
        versions=", ".join(f"{package.__name__} {package.__version__}" for package in packages),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these architectures or files")
    parser.add_argument(
        "--all", action="store_true", help="every architecture up to --max-params, at least the smallest of each file"
    )
    parser.add_argument("--max-params", type=float, default=60, help="in millions")
    parser.add_argument("--seed", type=int, help="a random architecture of each file")
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th pair, from the i-th")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=600, help="per architecture")
    parser.add_argument("--out", type=Path, default=Path("coverage"), help="rows of earlier runs, and the page")
    parser.add_argument("--docs", action="store_true", help=f"the page goes to {DOCS.name}/ instead")
    args = parser.parse_args()
    args.out.mkdir(exist_ok=True)
    first, shards = map(int, args.shard.split("/"))
    pairs = choose(args, all_architectures(args.out / "parameters.json", args.jobs))[first - 1 :: shards]
    rows = run(pairs, args.out / "rows.jsonl", args.jobs, args.seconds)
    made = origin(sys.argv[1:])
    (args.out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    write_pages(rows, made, DOCS if args.docs else args.out)
    print(summary(rows))


if __name__ == "__main__":
    main()
