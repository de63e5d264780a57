"""Arguments as people give them, names that docstrings cite, and what scripts and torch.hub need."""

import ast
import importlib
import pkgutil
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

import timm_bcos
from tests.helpers import ROOT, command, enliven, load_script, real_image
from timm_bcos import MethodError, ModelStateError, TargetError
from timm_bcos.attribution.registry import METHODS, attribute, register
from timm_bcos.weights.catalog import DEFAULT_MODEL


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return enliven(timm.create_model("bcosify", arch="test_resnet", num_classes=4), real_image(64, 2))


@pytest.mark.parametrize("target", [torch.tensor(3), np.int64(3), np.array(3), np.uint8(3)])
def test_one_class_in_any_form(network: nn.Module, target: Any) -> None:
    x = real_image(64, 2)
    assert torch.equal(attribute(network, x, target), attribute(network, x, 3))


@pytest.mark.parametrize("targets", [np.array([1, 3]), [np.int32(1), np.int32(3)], (1, torch.tensor(3))])
def test_classes_in_any_form(network: nn.Module, targets: Any) -> None:
    x = real_image(64, 2)
    assert torch.equal(attribute(network, x, targets), attribute(network, x, [1, 3]))


@pytest.mark.parametrize(
    "target", [torch.tensor(3.0), np.float32(3), torch.tensor(True), torch.tensor(4), np.int64(-1)]
)
def test_what_is_no_class(network: nn.Module, target: Any) -> None:
    with pytest.raises(TargetError, match="give 2 classes, whole numbers from 0 to 3"):
        attribute(network, real_image(64, 2), target)


@pytest.mark.parametrize("offset", [2e-7, -2e-7, 9e-5])
def test_attribute_takes_the_pixels_that_explain_takes(network: nn.Module, offset: float) -> None:
    x = real_image(64).clone()
    x[0, 0, 0, 0] = 1 + offset if offset > 0 else offset
    torch.testing.assert_close(attribute(network, x, 1), timm_bcos.explain(network, x, 1).contribution_map)


class Segmenter(nn.Module):
    """Logits of each position."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.classify = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.conv(x))  # type: ignore[no-any-return]


class Regression(Segmenter):
    """One number for each image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean((1, 2, 3))


@pytest.mark.parametrize("method", ["bcos", "gradient", "gradcam"])
def test_maps_of_logits_are_refused_by_every_method(method: str) -> None:
    pytest.importorskip("captum")
    model = timm_bcos.bcosify(Segmenter(), timm_bcos.BcosConfig(mean=(0.5,), std=(0.5,))).eval()
    for x in (torch.rand(2, 3, 8, 8), torch.rand(1, 3, 8, 8).expand(2, -1, -1, -1)):
        with pytest.raises(ModelStateError, match=r"returns .*: attribution needs logits \(N, K\)"):
            attribute(model, x, 2, method)


def test_regression_has_a_hint() -> None:
    pytest.importorskip("captum")
    model = timm_bcos.bcosify(Regression(), timm_bcos.BcosConfig(mean=(0.5,), std=(0.5,))).eval()
    with pytest.raises(ModelStateError, match=r"returns \(2,\): attribution needs.*output\[:, None\]"):
        attribute(model, torch.rand(2, 3, 8, 8), 0, "gradient")


def test_names_of_methods_are_not_taken_twice() -> None:
    built_in = METHODS["integrated_gradients"]
    with pytest.raises(MethodError, match=r"there is a method 'integrated_gradients'.*replace=True"):
        register("integrated_gradients")(lambda subject, x, targets: x[:, 0])
    assert METHODS["integrated_gradients"] is built_in
    try:
        register("integrated_gradients", replace=True)(lambda subject, x, targets: x[:, 0])
        assert METHODS["integrated_gradients"] is not built_in
    finally:
        METHODS["integrated_gradients"] = built_in


def test_the_help_names_the_default_network(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("explain", "--help") == 0
    text = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert DEFAULT_MODEL in text and "network for clothes" not in text


CITED = re.compile(r"`(timm_bcos(?:\.\w+)+)")


@pytest.mark.parametrize("path", sorted((ROOT / "timm_bcos").rglob("*.py")), ids=lambda path: path.stem)
def test_names_in_docstrings_and_comments_exist(path: Path) -> None:
    assert not [name for name in set(CITED.findall(path.read_text())) if not resolves(name)]


def resolves(name: str) -> bool:
    try:
        pkgutil.resolve_name(name)
    except (AttributeError, ImportError):
        return False
    return True


def test_a_name_that_does_not_exist_is_noticed() -> None:
    assert resolves("timm_bcos.nn.layers.BcosConv2d.forward") and not resolves("timm_bcos.nn.layers.Nothing")


def requirements() -> list[str]:
    section = (ROOT / "pyproject.toml").read_text().partition("\ndependencies = [")[2].partition("]")[0]
    return re.findall(r'"([\w-]+)', section)


def test_hubconf_lists_what_the_package_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT)
    hubconf = importlib.import_module("hubconf")
    imported = {"pillow": "PIL"}
    assert {imported.get(name, name.replace("-", "_")) for name in requirements()} == set(hubconf.dependencies)


NEWER = {"tomllib"}  # modules of Python's library that 3.10 lacks


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").rglob("*.py")), ids=lambda path: path.stem)
def test_scripts_import_what_python_3_10_has(path: Path) -> None:
    for node in ast.parse(path.read_text()).body:  # what stands under a condition is not imported by itself
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not NEWER & set(names)


def test_train_runs_reads_toml_without_tomllib(monkeypatch: pytest.MonkeyPatch) -> None:
    tomllib = pytest.importorskip("tomllib")  # which has the same interface
    monkeypatch.setitem(sys.modules, "tomli", tomllib)
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    assert load_script("train_runs").tomllib.loads("a = 1") == {"a": 1}
