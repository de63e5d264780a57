"""The code blocks of Markdown pages, the commands in them, and whether output is what a page shows."""

import re
import subprocess
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\w*)\n(?P<text>.*?)^(?P=indent)```$", re.DOTALL | re.MULTILINE)
MARK = re.compile(r"<!-- (?P<kind>parsed only|not tested): (?P<reason>.+) -->\s*$")
PROSE = ("bibtex", "text")  # languages of blocks that are no code
# programs that a block may call; the shell finds recorders in their place
PROGRAMS = (
    "bash", "cp", "hf", "mkdocs", "mypy", "pip", "python", "ruff", "timm-bcos", "torchrun",
)  # fmt: skip
RECORDER = """#!/bin/sh
{ basename "$0"; for argument in "$@"; do printf '%s\\n' "$argument"; done; printf '\\036\\n'; } >> "$RECORD"
"""


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        page: Its file.
        line: Of its first line.
        language: As the fence names it.
        text: What is in it, dedented.
        mark: 'parsed only' or 'not tested' if the page says so, else empty.
        reason: Why.
    """

    page: Path
    line: int
    language: str
    text: str
    mark: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.page.name}, line {self.line}"


def read_blocks(page: Path) -> list[Block]:
    """In the order of the page."""
    content = page.read_text(encoding="utf-8")
    blocks = []
    for found in FENCE.finditer(content):
        before = content[: found.start()]
        mark = MARK.search(before)
        text = textwrap.dedent(found["text"])
        line = before.count("\n") + 2
        kind, reason = (mark["kind"], mark["reason"]) if mark else ("", "")
        blocks.append(Block(page, line, found["language"], text, kind, reason))
    return blocks


def expand_commands(script: str, folder: Path) -> list[list[str]]:
    """The commands that a shell would run, with variables expanded: each is recorded instead.

    Args:
        script: A shell script.
        folder: Where it runs; recorders are written into `folder/.bin`.
    """
    programs, record = folder / ".bin", folder / ".record"
    programs.mkdir(exist_ok=True)
    record.write_text("")
    for name in PROGRAMS:
        (programs / name).write_text(RECORDER)
        (programs / name).chmod(0o755)
    environment = dict(PATH=f"{programs}:/usr/bin:/bin", RECORD=str(record))
    subprocess.run(["/bin/bash", "-euo", "pipefail", "-c", script], cwd=folder, env=environment, check=True)
    return [command.splitlines() for command in record.read_text().split("\x1e\n")[:-1]]


def sessions(text: str) -> list[tuple[str, str]]:
    """Commands of a `console` block, each after '$ ', and the output below it."""
    parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
    return list(zip(parts[1::2], parts[2::2], strict=True))


NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?")
ROUNDING = 1e-5  # numbers below this are rounding errors, of which the size is chance


def is_same_output(expected: str, found: str, tolerance: float = 1e-2) -> bool:
    """Equal but for spaces at line ends, and for numbers that differ by less than the tolerance or are rounding."""
    if _words(expected) != _words(found):
        return False
    pairs = zip(_numbers(expected), _numbers(found), strict=True)
    return all(max(abs(a), abs(b)) < ROUNDING or abs(a - b) <= tolerance * max(abs(a), abs(b)) for a, b in pairs)


def _words(text: str) -> Sequence[str]:
    return [NUMBER.sub("#", line).rstrip() for line in text.strip().splitlines()]


def _numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]
