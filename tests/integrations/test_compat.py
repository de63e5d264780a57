"""timm, torch and captum may rename what they do not document: nothing else than what needs it may fail."""

import ast
import importlib
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import timm
import torch

import timm_bcos
from timm_bcos import _compat
from timm_bcos.conversion.rules import RULES, resolve
from timm_bcos.errors import MissingError

PACKAGE = Path(timm_bcos.__file__).parent
LIBRARIES = ("timm", "torchvision", "captum", "torch")


def looked_up() -> Iterator[str]:
    """Names of timm's and torchvision's classes in the table of rules, and those that the source asks `_compat` for."""
    yield from (key for key in RULES if isinstance(key, str) and not key.startswith("torch."))
    yield from (name for name in _compat.PRIVATE.values() if name.startswith("timm."))
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        libraries = dict(timm_layers="timm.layers", timm_models="timm.models")
        libraries = {name: library for name, library in libraries.items() if re.search(rf"import .*\b{name}\b", source)}
        libraries |= dict(re.findall(r'(\w+): Any = Library\("(.*?)"\)', source))
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in libraries:
                yield f"{libraries[node.value.id]}.{node.attr}"


def is_there(name: str) -> bool:
    module, _, attribute = name.rpartition(".")
    return hasattr(importlib.import_module(module), attribute)


NAMED = sorted({name for name in looked_up() if not inspect.ismodule(_compat.find(name))})


def imports() -> Iterator[tuple[Path, str, str]]:
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                yield from ((path, node.module, alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                yield from ((path, alias.name, "") for alias in node.names)


def test_private_names_of_other_libraries_stand_in_one_place() -> None:
    for path, module, name in imports():
        parts = [*module.split("."), name]
        if parts[0] in LIBRARIES and any(part.startswith("_") for part in parts):
            pytest.fail(f"{path.relative_to(PACKAGE)} imports {module}.{name}")


def test_no_class_of_timms_is_imported_by_name() -> None:
    """But for training tasks, which only training imports."""
    for path, module, name in imports():
        if module.partition(".")[0] == "timm" and name and module != "timm.task":
            kind = getattr(importlib.import_module(module), name)
            assert not isinstance(kind, type), f"{path.relative_to(PACKAGE)} imports {module}.{name}"


def test_all_names_are_those_of_classes_today() -> None:
    assert [name for name in looked_up() if not is_there(name)] == []
    names = [key for key in RULES if isinstance(key, str)]
    assert [name for name in names if not resolve({name: RULES[name]})] == []
    for name in _compat.PRIVATE.values():
        if not name.startswith("captum"):
            assert callable(_compat.find(name)), name


def test_types_are_found_under_their_names() -> None:
    assert RULES[torch.nn.Conv2d] is RULES["torch.nn.Conv2d"]
    own = RULES | {torch.nn.Conv2d: timm_bcos.keep}
    assert own[torch.nn.Conv2d] is timm_bcos.keep and own[torch.nn.Linear] is RULES["torch.nn.Linear"]
    assert resolve(own)[torch.nn.Conv2d] is timm_bcos.keep
    with pytest.raises(KeyError):
        RULES[timm.models.ResNet]


def test_a_name_in_a_table_of_ones_own() -> None:
    config = timm_bcos.BcosConfig(mean=(0.5,), std=(0.5,))
    rules = RULES | {"timm.layers.norm_act.BatchNormAct2d": timm_bcos.keep}
    model = timm_bcos.bcosify(timm.create_model("resnetv2_18", num_classes=2), config, rules=rules)
    assert any(type(module) is timm.layers.BatchNormAct2d for module in model.modules())


@contextmanager
def without(name: str) -> Iterator[None]:
    """No module of the library has that class, under this name or another."""
    module, _, attribute = name.rpartition(".")
    kind = getattr(importlib.import_module(module), attribute)
    library = name.partition(".")[0]
    places = [
        (owner, key)
        for path, owner in list(sys.modules.items())
        if path.partition(".")[0] == library and owner is not None
        for key, value in list(vars(owner).items())
        if value is kind
    ]
    for owner, key in places:
        delattr(owner, key)
    try:
        yield
    finally:
        for owner, key in places:
            setattr(owner, key, kind)


@contextmanager
def imported_anew() -> Iterator[list[str]]:
    """This package, imported into a fresh place; yields what it warned of."""
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] == "timm_bcos"}
    said: list[str] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            importlib.import_module("timm_bcos")
            said += [str(w.message) for w in caught if "Overwriting" not in str(w.message)]
        yield said
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "timm_bcos"]:
            del sys.modules[name]
        sys.modules.update(before)


def import_without_each_class(names: Iterable[str]) -> None:
    """Each in turn: the models register, without a warning."""
    warnings.filterwarnings("ignore", "Overwriting")
    for name in names:
        with without(name), imported_anew() as said:
            assert said == [], name
            assert sys.modules["timm_bcos.models.bcos_models"].ENTRY_POINTS.keys() >= {"bcosify", "bcos_resnet18"}
    print("all registered")


@pytest.mark.parametrize("step", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_import_survives_the_loss_of_any_class(step: int, python: Callable[[str], str]) -> None:
    """In a process of its own: others would see what was imported last."""
    assert len(NAMED) > 150 and "timm.models.VisionTransformer" in NAMED and "timm.layers.LayerNorm2d" in NAMED
    code = "from tests.integrations import test_compat as t; t.import_without_each_class(sorted(t.NAMED)[::{}])"
    assert "all registered\n" in python(code.format(step))


def test_timm_survives_whatever_we_do(python: Callable[[str], str]) -> None:
    code = """
import wrapt
wrapt.when_imported("timm.models.csatv2")(lambda module: delattr(module, "Dct1d"))
import timm_bcos
import timm
print(timm.is_model("bcos_resnet18"), timm.create_model("bcos_cnn9", device="meta").fc.b)
"""
    assert python(code).strip() == "True 2.0"
    broken = "import sys\nsys.modules['timm_bcos.models.architectures'] = None\n"
    assert python(broken + "import timm_bcos, timm\nprint(timm.is_model('resnet18'))").strip().endswith("True")


def test_what_is_missing_says_so_when_it_is_needed() -> None:
    stand_in = _compat.find("timm.layers.NoSuchLayer")
    assert not isinstance(torch.nn.Identity(), stand_in)
    with pytest.raises(MissingError, match=r"timm [\d.]+ has no timm.layers.NoSuchLayer.*install another version"):
        stand_in(3)
    with pytest.raises(MissingError, match=r"captum.* has no captum\.nothing\.at_all"):
        _compat.find("captum.nothing.at_all")()
    assert _compat.Library("timm.layers").NoSuchLayer is stand_in


def test_a_clone_of_timm_that_hides_the_installed_one(python: Callable[[str], str], tmp_path: Path) -> None:
    """Which timm was found where, which is needed, and what to do: in Python and on the command line."""
    (tmp_path / "timm" / "models").mkdir(parents=True)
    (tmp_path / "timm" / "version.py").write_text("__version__ = '1.0.9.dev0'\n")
    (tmp_path / "timm" / "__init__.py").write_text("from .version import __version__\n")
    (tmp_path / "timm" / "models" / "__init__.py").touch()
    code = f"""
import sys, warnings
sys.path.insert(0, {str(tmp_path)!r})
import timm_bcos
try:
    timm_bcos.explain
except timm_bcos.errors.MissingError as error:
    print(error)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import timm
print(caught[0].message)
from timm_bcos.cli.exceptions import exit_status
sys.stderr = sys.stdout
sys.argv = ["timm-bcos", "models"]
from timm_bcos.cli.app import app
print(exit_status(app))
"""
    first, second, third, status = python(code).strip().splitlines()
    for line in (first, second, third):
        assert f"found timm 1.0.9.dev0 in {tmp_path / 'timm'}, timm_bcos needs timm>={_compat.LEAST_TIMM}" in line
        assert f"this folder hides the installed timm {timm.__version__} (" in line and "rename or update it" in line
    assert second.startswith("timm_bcos cannot register its models with timm 1.0.9.dev0 in")
    assert third.startswith("timm-bcos: ModuleNotFoundError") and status == "1"


def test_the_least_timm_is_that_of_the_package() -> None:
    text = (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"timm>={_compat.LEAST_TIMM}"' in text
    assert _compat.describe_timm().startswith(f"found timm {timm.__version__} in {Path(timm.__file__).parent}, ")
    _compat.check_timm()
