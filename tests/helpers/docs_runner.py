"""Runs the code blocks of Markdown pages, those of a page in order and in one namespace.

All pages run in one interpreter, each in a folder that holds the files it mentions (see test_docs.py). `timm-bcos` is
called in this interpreter. Scripts of this repository and of timm are run until their command line is parsed, because
the rest would take a network or hours.
"""

import argparse
import doctest
import os
import re
import runpy
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import timm
import torch
import typer
from typer.testing import CliRunner

import timm_bcos
from tests.helpers.docs_blocks import Block, expand_commands, is_same_output, read_blocks, sessions
from tests.helpers.memory import free_memory, trim
from tests.helpers.timm_scripts import NAMES as TIMM_SCRIPTS
from tests.helpers.timm_scripts import parser_of
from timm_bcos.cli.app import app
from timm_bcos.models import loading
from timm_bcos.weights.catalog import EMBEDDED

ROOT = Path(__file__).resolve().parents[2]
ENDLESS = ("demo",)  # a server, whose command line is parsed
Command = list[str]
LOCAL = ("hf-hub:", "local-dir:", *(name.partition(".")[0] for name in EMBEDDED))


# Weights.


def serve_pretrained_weights(folder: Path) -> None:
    """Let `pretrained=True` load random weights, kept in `folder`, instead of downloads."""
    create = timm.create_model

    def create_model(model_name: str, pretrained: bool = False, **kwargs: Any) -> Any:
        overlay = kwargs.get("pretrained_cfg_overlay") or {}
        if pretrained and "file" not in overlay and not model_name.startswith(LOCAL):
            name = kwargs.get("arch", model_name)
            file = folder / f"{name}.pth"
            if not file.exists():
                torch.save(create(name).state_dict(), file)
            kwargs["pretrained_cfg_overlay"] = dict(overlay, file=str(file))
        return create(model_name, pretrained=pretrained, **kwargs)

    timm.create_model = create_model
    loading._check_hub = lambda name: None  # nothing is downloaded


# Programs.


def timm_bcos_command(arguments: Command, is_parsed_only: bool) -> str:
    """Its output."""
    if arguments[0] == "run":
        commands: Any = typer.main.get_command(app)
        given = commands.commands["run"].make_context("run", arguments[1:]).params
        check_script([str(given["script"]), *(given["arguments"] or ())])
        return ""
    if is_parsed_only or arguments[0] in ENDLESS:
        command: Any = typer.main.get_command(app)
        silence(command)
        command.main(arguments, "timm-bcos", standalone_mode=False)
        return ""
    less = [option for words, options in LESS.items() if tuple(arguments[: len(words)]) == words for option in options]
    result = CliRunner().invoke(app, [*arguments, *less], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def silence(command: Any) -> None:
    """Let a command line be parsed and nothing be done."""
    for sub in getattr(command, "commands", {}).values():
        silence(sub)
    command.callback = lambda **_: None


def check_script(command: Command) -> None:
    """A script of timm's or of this repository, and its arguments."""
    script, *arguments = command
    if script in TIMM_SCRIPTS:
        check_training(parser_of(script).parse_args(arguments))
    else:
        parse_own_script(Path(script), arguments)


def check_training(args: argparse.Namespace) -> None:
    """What a parser does not know: the networks and their keywords."""
    for module in getattr(args, "device_modules", None) or []:
        __import__(module)
    if name := getattr(args, "model", None):
        assert timm.is_model(name), name
        known = {*vars(timm_bcos.BcosConfig()), "arch"}
        given = {pair.partition("=")[0] for pair in args.model_kwargs or [] if "=" in str(pair)}
        assert given <= known, given - known


class Parsed(Exception):  # noqa: N818  (it ends a script)
    """A script's command line has been parsed."""


@contextmanager
def stopping_after_parsing() -> Iterator[None]:
    with ExitStack() as changes:
        for name in ("parse_args", "parse_intermixed_args"):
            changes.enter_context(mock.patch.object(argparse.ArgumentParser, name, _stopping(name)))
        yield


def _stopping(name: str) -> Callable[..., None]:
    parse = getattr(argparse.ArgumentParser, name)

    def stop(*args: Any, **kwargs: Any) -> None:
        parse(*args, **kwargs)
        raise Parsed

    return stop


def parse_own_script(script: Path, arguments: Command) -> None:
    path, argv = list(sys.path), sys.argv
    sys.argv, sys.path[0:0] = [str(script), *arguments], [str(script.resolve().parent)]
    try:
        with stopping_after_parsing():
            runpy.run_path(str(script), run_name="__main__")
        raise AssertionError(f"{script} parses no command line")
    except Parsed:
        pass
    finally:
        sys.path[:], sys.argv = path, argv


def python_program(arguments: Command, is_parsed_only: bool) -> str:
    if arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    elif arguments[:2] == ["-m", "timm_bcos"]:
        return timm_bcos_command(arguments[2:], is_parsed_only)
    elif arguments[:2] == ["-m", "pytest"]:
        assert all((ROOT / a).exists() for a in arguments if a.startswith("tests/"))
    elif arguments[0] == "scripts/recipes/lite0_weights.py":
        subprocess.run([sys.executable, *arguments], check=True)
    else:
        check_script(arguments)
    return ""


def torchrun(arguments: Command, is_parsed_only: bool) -> str:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(arguments)
    assert args.module and args.training_script == "timm_bcos"
    return timm_bcos_command(args.training_script_args, is_parsed_only)


def pip(arguments: Command, is_parsed_only: bool) -> str:
    """The extras must exist."""
    section = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]")[2].partition("\n[")[0]
    extras = set(re.findall(r"^(\w+) = \[", section, re.MULTILINE))
    for argument in arguments:
        if "[" in argument:
            named = argument.partition("[")[2].rstrip("]").split(",")
            assert set(named) <= extras, argument
    return ""


def bash(arguments: Command, is_parsed_only: bool) -> str:
    subprocess.run(["/bin/bash", "-n", ROOT / arguments[0]], check=True)
    return ""


def nothing(arguments: Command, is_parsed_only: bool) -> str:
    """Programs of others, whose command lines are theirs."""
    return ""


# options that let a command do less of the same
LESS = {
    ("evaluate", "metrics"): ["--metric", "insertion", "--metric", "single_deletion"],
    ("concepts",): ["--top", "1", "--images", "2"],
}

RUN: dict[str, Callable[[Command, bool], str]] = {
    "bash": bash,
    "pip": pip,
    "python": python_program,
    "timm-bcos": timm_bcos_command,
    "torchrun": torchrun,
}


# Blocks.


def run_shell(script: str, is_parsed_only: bool) -> str:
    commands = expand_commands(script, Path.cwd())
    if "PYTHONPATH=scripts/recipes" in script:
        sys.path.append(str(ROOT / "scripts" / "recipes"))
    return "".join(RUN.get(program, nothing)(rest, is_parsed_only) for program, *rest in commands)


def run_console(block: Block, names: dict[str, Any]) -> None:
    for command, expected in sessions(block.text):
        found = run_shell(command, bool(block.mark))
        assert block.mark or is_same_output(expected, found), f"{block}: {command} printed\n{found}"


def run_bash(block: Block, names: dict[str, Any]) -> None:
    run_shell(block.text, bool(block.mark))


def run_python(block: Block, names: dict[str, Any]) -> None:
    code = compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")
    if not block.mark:
        exec(code, names)


class Checker(doctest.OutputChecker):
    """Numbers may differ as they do in `is_same_output`."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return super().check_output(want, got, optionflags) or is_same_output(want, got)


def run_pycon(block: Block, names: dict[str, Any]) -> None:
    test = doctest.DocTestParser().get_doctest(block.text, names, str(block), str(block.page), block.line - 1)
    test.globs = names
    runner = doctest.DocTestRunner(Checker(), optionflags=doctest.ELLIPSIS)
    assert runner.run(test, clear_globs=False).failed == 0


LANGUAGES: dict[str, Callable[[Block, dict[str, Any]], None]] = {
    "bash": run_bash,
    "console": run_console,
    "pycon": run_pycon,
    "python": run_python,
}


def run_page(page: Path, folder: Path) -> None:
    """Run all blocks of a page in `folder`.

    Raises:
        AssertionError: A block fails, or prints something else than the page shows.
    """
    names: dict[str, Any] = {"__name__": "__docs__"}
    path, before = list(sys.path), Path.cwd()
    os.chdir(folder)
    try:
        for block in read_blocks(page):
            if block.language in LANGUAGES and block.mark != "not tested":
                torch.manual_seed(0)
                run_block(block, names)
                trim()
    finally:
        sys.path[:] = path
        os.chdir(before)
        names.clear()
        free_memory()


def run_block(block: Block, names: dict[str, Any]) -> None:
    try:
        LANGUAGES[block.language](block, names)
    except BaseException as error:  # SystemExit would end the interpreter
        raise AssertionError(f"failed: {block}\n{block.text}\n{traceback.format_exc()}") from error
