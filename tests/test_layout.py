"""Layout: imports run one way, and no module hides behind a public name."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import timm_bcos
from tests.processes import run_python

PACKAGE = Path(timm_bcos.__file__).parent
MODULES = {path: path.relative_to(PACKAGE.parent).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py")}
# from the lowest layer to the highest: a package imports from those before it
LAYERS = (
    "errors", "_compat", "files", "prefetch", "distributed", "nn", "dynamic_linear", "explanation", "conversion",
    "integrations", "weights", "models", "data", "explainer", "training", "attribution", "evaluation", "concepts",
    "hub", "viewer", "demo", "cli",
)  # fmt: skip


def imports(path: Path) -> Iterator[str]:
    """Names of the package's own modules that a file imports, wherever in it, but for annotations alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].relative_to(PACKAGE.parent).as_posix()
            module = f"{base}/{(node.module or '').replace('.', '/')}".rstrip("/")
            for alias in node.names:
                deeper = f"{module}/{alias.name}"
                yield deeper if deeper in MODULES.values() else module


GRAPH = {name: set(imports(path)) for path, name in MODULES.items()}


def layer_of(module: str) -> str:
    parts = module.split("/")
    return parts[1] if len(parts) > 1 else "__init__"


def test_imports_run_one_way() -> None:
    for module, needed in GRAPH.items():
        if layer_of(module) in LAYERS:
            later = {
                m
                for m in needed
                if layer_of(m) in LAYERS and LAYERS.index(layer_of(m)) > LAYERS.index(layer_of(module))
            }
            assert not later, f"{module} imports {later}"
    assert {layer_of(m) for m in GRAPH} <= {*LAYERS, "__init__", "__main__"}


def test_no_imports_in_circles() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"circle: {' -> '.join((*way, module))}"
        if module not in done:
            for needed in GRAPH.get(module, ()):
                visit(needed, (*way, module))
            done.add(module)

    for module in GRAPH:
        if not module.endswith("__init__"):
            visit(module, ())


def test_no_module_is_called_like_a_public_name() -> None:
    modules = {Path(name).name for name in MODULES.values()} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    assert not modules & set(timm_bcos.__all__)


def test_registered_modules_are_unique_in_timm() -> None:
    from timm.models._registry import _module_to_models

    own = {name for name, models in _module_to_models.items() if any(m.startswith("bcos") for m in models)}
    assert own == {"bcos_models"}


@pytest.mark.parametrize("path", sorted(MODULES), ids=lambda path: MODULES[path])
def test_files_are_short_and_say_what_they_are(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 400
    assert ast.get_docstring(ast.parse(text))
    assert "unittest" not in text


# One from each package, and modules that could be half-imported when `import timm` registers our models.
ENTRANCES = (
    "_compat", "conversion.converted", "conversion.rules", "data.photos", "demo.app", "dynamic_linear.mode",
    "explanation.api", "models.architectures", "models.bcos_models", "models.vit", "nn.layers", "training.tasks",
    "weights.formats",
)  # fmt: skip


@pytest.mark.parametrize("name", ENTRANCES)
def test_any_module_may_be_imported_first(name: str) -> None:
    error = "import warnings; warnings.filterwarnings('error', 'timm_bcos cannot register')"
    code = f"{error}\nimport timm_bcos.{name}, timm\nprint(timm.is_model('bcos_densenet121'), timm.is_model('bcosify'))"
    assert run_python(code) == (0, "True True\n")


def test_the_package_is_light_until_it_is_used() -> None:
    code = "import sys, timm_bcos; assert timm_bcos.__version__ and not {'torch', 'timm', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("first", ["timm_bcos, timm", "timm, timm_bcos"])
def test_models_are_registered_whichever_is_imported_first(first: str) -> None:
    assert run_python(f"import {first}; print(timm.is_model('bcos_densenet121'))") == (0, "True\n")


def test_every_public_name_is_there() -> None:
    assert all(hasattr(timm_bcos, name) for name in timm_bcos.__all__)
