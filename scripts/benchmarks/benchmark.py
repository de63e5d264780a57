"""Time training steps, inference and explanations, side by side in one run.

For each architecture: timm's plain model, the PyPI package `bcos`, ours without MaxOut as that package builds it, its
fused copy, and the paper's model with MaxOut 2. Rounds alternate between the models, so that a slow moment of the
machine hits all. A figure is the ratio of medians to the plain model's, beside the quartiles of the ratio per round.
Peak memory is measured in a process of its own per case.
"""

import argparse
import json
import platform
import statistics
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import timm
import torch
from benchmark_cases import ARCHITECTURES, JOBS, Case, Settings, contestants, peak_memory, prepare, seconds
from benchmark_methods import time_methods
from benchmark_scaling import measure_scaling, plot_scaling
from torch.profiler import ProfilerActivity
from tqdm import tqdm

from timm_bcos.files import atomic_path

Times = dict[str, list[float]]  # contestant to seconds of each round


def race(name: str, job: str, cases: dict[str, Case], rounds: int) -> Times:
    """Seconds of each contestant in each round, but for a first one that warms up."""
    times: Times = {kind: [] for kind in cases}
    for i in tqdm(range(rounds + 1), desc=f"{name}, {job}", leave=False, disable=None):
        for kind, case in cases.items():
            elapsed = seconds(JOBS[job][0], case)
            if i:
                times[kind].append(elapsed)
    return times


def ratios(times: Times, kind: str, reference: str = "plain") -> tuple[float, float, float]:
    """Ratio of medians, and quartiles of the ratios of the rounds."""
    each = [own / plain for own, plain in zip(times[kind], times[reference], strict=True)]
    low, _, high = statistics.quantiles(each, method="inclusive") if len(each) > 1 else each * 3
    return statistics.median(times[kind]) / statistics.median(times[reference]), low, high


def lines(job: str, times: Times, memory: dict[str, float]) -> Iterator[str]:
    """The table of a job, a line per contestant."""
    for kind, values in times.items():
        ratio, low, high = ratios(times, kind)
        peak = f"  peak {memory[kind]:6.0f} MiB ({memory[kind] / memory['plain']:.2f}×)" if kind in memory else ""
        time = f"{1e3 * statistics.median(values):8.1f} ms  {ratio:5.2f}× ({low:.2f} to {high:.2f})"
        yield f"  {job:<14} {kind:<17} {time}{peak}"


def compete(name: str, args: argparse.Namespace, settings: Settings) -> list[dict[str, object]]:
    """Time one model's contestants at each job."""
    print(f"\n{name}, {describe(settings)}")
    kinds = [kind for kind in contestants(name) if not args.contestants or kind in args.contestants]
    found: list[dict[str, object]] = []
    for job in args.jobs:
        if settings.compiled and JOBS[job][0].__name__.startswith("explain"):
            continue
        cases = {kind: prepare(name, kind, settings) for kind in kinds if kind in JOBS[job][1]}
        times = race(name, job, cases, args.rounds)
        memory = {kind: peak_memory(name, kind, job, settings) for kind in cases} if args.memory else {}
        print("\n".join(lines(job, times, memory)), flush=True)
        if args.profile:
            print("\n".join(f"  {job:<14} {kind:<17} {profile(job, case)}" for kind, case in cases.items()))
        found += [
            dict(
                network=name, job=job, contestant=kind, settings=asdict(settings), seconds=values, mib=memory.get(kind)
            )
            for kind, values in times.items()
        ]
    return found


def profile(job: str, case: Case, runs: int = 3, top: int = 12) -> str:
    """Milliseconds of one run that the costliest operators take by themselves."""
    activities = [ProfilerActivity.CUDA if case.settings.device == "cuda" else ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(runs):
            JOBS[job][0](case)
    kind = "self_device_time_total" if case.settings.device == "cuda" else "self_cpu_time_total"
    found = [(getattr(row, kind) / 1e3 / runs, row.key) for row in profiler.key_averages()]
    whole = sum(time for time, _ in found)
    costliest = sorted(found, reverse=True)[:top]
    return ", ".join(f"{name.removeprefix('aten::')} {time:.0f}" for time, name in costliest) + f"; all {whole:.0f}"


def describe(settings: Settings) -> str:
    """What is not the default of torch."""
    words = [f"batch {settings.batch}", f"{settings.size}²", settings.device]
    words += [settings.dtype] if settings.dtype != "float32" else []
    words += ["channels_last"] if settings.channels_last else []
    return ", ".join(words + (["compiled"] if settings.compiled else []))


def machine(device: str) -> dict[str, object]:
    """What the figures depend on."""
    card = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    return dict(torch=torch.__version__, timm=timm.__version__, device=card, threads=torch.get_num_threads())


def main(args: argparse.Namespace) -> None:
    """Do what the command line says."""
    warnings.simplefilter("ignore")
    if args.methods:
        return time_methods(args.methods, args.batches, args.rounds)
    if args.scaling:
        measure_scaling(args.csv, args.rounds)
        return plot_scaling(args.csv, args.figure)
    about = machine(args.device)
    print(", ".join(f"{key} {value}" for key, value in about.items()) + f", {args.rounds} rounds")
    found: list[dict[str, object]] = []
    asked = Settings(args.batch, args.size, args.device, args.dtype, args.channels_last, args.compile)
    for name in args.networks:
        found += compete(name, args, replace(asked, batch=64, size=32) if name == "cnn9" else asked)
        write_json(args.json, dict(about, rounds=args.rounds, results=found))
    return None


def write_json(path: Path | None, content: dict[str, object]) -> None:
    """Whole or not at all."""
    if path is not None:
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(content, indent=1))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add(
        "networks",
        nargs="*",
        default=list(ARCHITECTURES),
        help=f"of timm, or cnn9; default: {', '.join(ARCHITECTURES)}",
    )
    add("--rounds", type=int, default=7)
    add("--batch", type=int, default=8)
    add("--size", type=int, default=224)
    jobs = list(JOBS)
    add("--jobs", nargs="+", choices=jobs, default=jobs[:3], metavar="JOB", help=f"of {', '.join(map(repr, jobs))}")
    add("--contestants", nargs="+", metavar="NAME", help="these alone, and the plain model")
    add("--device", choices=["cpu", "cuda"], default="cpu")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="of autocast")
    add("--channels-last", action="store_true")
    add("--compile", action="store_true", help="with torch.compile instead, but for explanations")
    add("--memory", action="store_true", help="also measure peak memory")
    add("--profile", action="store_true", help="also print the costliest operators")
    add("--json", type=Path, metavar="FILE", help="keep every time measured")
    add("--scaling", action="store_true", help="instead: how cost grows with size, batch, depth and classes")
    add("--csv", type=Path, default=Path("docs/results/scaling.csv"), help="of --scaling, which resumes from it")
    add("--figure", type=Path, default=Path("docs/images/scaling.webp"), help="of --scaling")
    add("--methods", metavar="MODEL", help="instead: time the attribution methods on this model")
    add("--batches", nargs="+", type=int, default=[1, 8, 32], help="for --methods")
    args = parser.parse_args(arguments)
    wrong = [name for name in args.networks if name != "cnn9" and not timm.is_model(name)]
    if wrong:
        parser.error(f"timm has no model {wrong[0]!r}")
    if args.contestants and "plain" not in args.contestants:
        args.contestants.insert(0, "plain")
    if min(args.rounds, args.batch, args.size) < 1:
        parser.error("--rounds, --batch and --size must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this machine has no GPU that torch can use")
    return args


if __name__ == "__main__":
    main(parse())
