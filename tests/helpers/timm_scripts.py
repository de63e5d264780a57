"""The command lines of timm's scripts, which its package does not contain: parsers made from their options.

`timm_scripts.json` lists the options of timm's train.py, validate.py and avg_checkpoints.py. It was written by

    python -m tests.helpers.timm_scripts FOLDER_OF_TIMMS_REPOSITORY

which imports the scripts and reads their parsers. With the variable TIMM_SCRIPTS=FOLDER the tests take the real ones.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

STORE = Path(__file__).with_name("timm_scripts.json")
NAMES = ("train.py", "validate.py", "avg_checkpoints.py")
TYPES = {"int": int, "float": float}


def parser_of(name: str) -> argparse.ArgumentParser:
    """The script's own parser where TIMM_SCRIPTS says where it is, else one with the same options."""
    folder = os.environ.get("TIMM_SCRIPTS")
    return real_parser(Path(folder) / name) if folder else stored_parser(name)


def real_parser(path: Path) -> argparse.ArgumentParser:
    """Of a script, which is imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    parser: argparse.ArgumentParser = module.parser
    return parser


def stored_parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(name)
    for option in json.loads(STORE.read_text())[name]:
        flags, takes, kind = option["flags"], option["nargs"], option["type"]
        if takes == 0:
            parser.add_argument(*flags, action="store_true")
        else:
            choices = option["choices"]
            parser.add_argument(*flags, nargs=takes, type=TYPES.get(kind, str), choices=choices)
    return parser


def options(parser: argparse.ArgumentParser) -> list[dict[str, Any]]:
    """What `stored_parser` needs to know."""
    return [
        dict(
            flags=action.option_strings or [action.dest],
            nargs=action.nargs,
            type=getattr(action.type, "__name__", None),
            choices=list(action.choices) if action.choices else None,
        )
        for action in parser._actions
        if not isinstance(action, argparse._HelpAction)
    ]


def main() -> None:
    folder = Path(sys.argv[1])
    stored = {name: options(real_parser(folder / name)) for name in NAMES}
    lines = [f'"{name}": [\n' + ",\n".join(map(json.dumps, rows)) + "\n]" for name, rows in stored.items()]
    STORE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
