"""Second step of a conversion: decide, and build, everything that will change, without changing the model.

`plan_conversion` asks the rule of each module for its replacement, decides how images are read, and refuses the
conversion if anything is in the way.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import UnsupportedModuleError
from ..nn.heads import BcosConvClassifier, BcosFlatten, BcosLinearClassifier, BcosPool2d
from ..nn.layers import BcosConv2d, BcosLinear
from ..nn.module_utils import buffer_device
from ..nn.stems import BcosStem, ImageReader
from .fusing import FOLDING
from .inspection import IN_ORDER, Inspection, reference_activations
from .positions import PositionedQkv, Positions, attention_paths
from .problems import (
    computed_weight_problem,
    input_problems,
    lost_hook_problems,
    model_problems,
    no_rule_problem,
    probability_problem,
    state_hook_problem,
    wrapper_problem,
)
from .rules import Rule, Rules, RulesByType, keep, keep_leaf, resolve, rule_for

__all__ = ["Plan", "Replacement", "convertible_modules", "plan_conversion"]


class Replacement(NamedTuple):
    """A module and what it becomes, which is the module itself if it is kept."""

    old: nn.Module
    new: nn.Module


@dataclass(frozen=True)
class Plan:
    """A conversion, decided and built in full. `str(plan)` is a table of its replacements.

    Attributes:
        converted: What the model becomes: itself, or the replacement of its root.
        root: `converted`, or a Sequential of an `ImageReader` and `converted`.
        replacements: Modules that become others, by path, parents first.
        attributes: Attributes of the root, its config and its `ImageReader` included.
        forward_calls_reader: Whether the root's forward methods call the `ImageReader`; otherwise the reader is a layer
            of the root.
        foldable: Modules whose methods would fold norms or branches into the weights of B-cos layers.
        reference_activations: Reference activations of batch norms, by path in `converted`.
    """

    converted: nn.Module
    root: nn.Module
    replacements: dict[str, Replacement]
    attributes: dict[str, Any]
    forward_calls_reader: bool
    foldable: tuple[nn.Module, ...]
    reference_activations: dict[str, Tensor]

    def __str__(self) -> str:
        table = self.replacements.items()
        rows = [(path or "(root)", type(old).__name__, type(new).__name__) for path, (old, new) in table]
        widths = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
        return "\n".join(f"{path:{widths[0]}}  {old:{widths[1]}}  -> {new}" for path, old, new in rows)


def plan_conversion(inspection: Inspection, rules: Rules) -> Plan:
    """Decide a conversion.

    Args:
        inspection: Inspection of the model, which is not changed.
        rules: Table from exact module type, or its qualified name, to rule.

    Raises:
        UnsupportedModuleError: Lists everything that is in the way.
        InputError: If `bias="reference"` needs to run the model, and it does not run on images of its own size.
    """
    table = _ask_rules(inspection, resolve(rules))
    modules = table.modules()
    needs_reader = not any(isinstance(m, BcosStem | ImageReader) for m in modules)
    problems = [*model_problems(inspection), *table.problems]
    problems += lost_hook_problems(inspection.model, [row.old for row in table.rows.values()], modules)
    if needs_reader:
        problems += input_problems(inspection, table.root)
    positions = _plan_positions(inspection, table, problems)
    if problems:
        raise UnsupportedModuleError(problems)
    reader = _image_reader(inspection) if needs_reader else None
    return _build_plan(inspection, rules, table, reader, positions)


def _build_plan(
    inspection: Inspection, rules: Rules, table: "_Table", reader: ImageReader | None, positions: Positions | None
) -> Plan:
    model, config, converted = inspection.model, inspection.config, table.root
    # An attribute set on a Sequential becomes its last layer, so the reader needs a Sequential of its own.
    is_sequential = type(converted).forward is nn.Sequential.forward
    root = converted if reader is None or not is_sequential else _sequential(reader, converted)
    root_attributes = dict(image_reader=reader if root is converted else None, positions=positions)
    return Plan(
        converted=converted,
        root=root,
        replacements={path: row for path, row in table.rows.items() if row.new is not row.old},
        attributes=dict(
            bcos_config=config,
            bcos_rules=rules,
            head_paths=_head_paths(model, table, prefix="" if root is converted else CONVERTED),
            **{name: value for name, value in root_attributes.items() if value is not None},
            **_described(converted, inspection.channels, table),
        ),
        forward_calls_reader=root_attributes["image_reader"] is not None and not isinstance(root, IN_ORDER),
        foldable=tuple(m for m in table.modules() if _is_foldable(m)),
        reference_activations=reference_activations(model) if config.bias == "reference" else {},
    )


# Replacements


@dataclass
class _Table:
    """What each module of a model becomes.

    Attributes:
        rows: Modules by path, parents first; modules within a module that is replaced as a whole are absent.
        problems: Reasons why modules cannot be converted.
    """

    rows: dict[str, Replacement] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def root(self) -> nn.Module:
        """What the model itself becomes."""
        return self.rows[""].new

    def modules(self) -> list[nn.Module]:
        """All modules of the converted model."""
        return list({id(m): m for m in self._within("", self.root)}.values())

    def _within(self, path: str, module: nn.Module) -> Iterator[nn.Module]:
        yield module
        for name, child in module._modules.items():
            if child is not None:
                child_path = _join(path, name)
                row = self.rows.get(child_path)
                yield from self._within(child_path, child if row is None else row.new)


def _ask_rules(inspection: Inspection, rules: RulesByType) -> _Table:
    table = _Table()
    answers: dict[int, nn.Module] = {}  # a module with several paths is converted once

    def replace(path: str, module: nn.Module) -> nn.Module:
        if id(module) not in answers:
            answers[id(module)] = _ask_rule(inspection, rules, path, module, table.problems)
        return answers[id(module)]

    for path, module, new in _visit("", inspection.model, rules, replace):
        table.rows[path] = Replacement(module, new)
    return table


def _ask_rule(
    inspection: Inspection, rules: RulesByType, path: str, module: nn.Module, problems: list[str]
) -> nn.Module:
    """The module's replacement, or the module itself and a further problem."""
    rule = rule_for(module, rules)
    problem = _module_problem(inspection, path, module, rule)
    new = module
    if rule is not None and problem is None:
        try:
            new = rule(module, inspection.roles[path], inspection.config)
        except UnsupportedModuleError as refusal:
            problems += refusal.problems
        problem = None if new is module else state_hook_problem(module)
    if problem is not None:
        problems.append(f"{path or '(root)'}: {problem}")
    return new


def _module_problem(inspection: Inspection, path: str, module: nn.Module, rule: Rule | None) -> str | None:
    return (
        wrapper_problem(module)
        or (None if rule in (keep, keep_leaf) else computed_weight_problem(module))
        or (no_rule_problem(module) if rule is None else None)
        or probability_problem(inspection, path)
    )


def _visit(
    path: str, module: nn.Module, rules: RulesByType, replace: Callable[[str, nn.Module], nn.Module]
) -> Iterator[tuple[str, nn.Module, nn.Module]]:
    """Modules with their paths and replacements, parents first.

    Children are visited if the replacement has left them in place. `named_children` would skip the second name of a
    module.
    """
    new = replace(path, module)
    yield path, module, new
    if rule_for(module, rules) is keep_leaf or wrapper_problem(module) is not None:
        return
    for name, child in module._modules.items():
        is_kept = getattr(new, name, None) is child
        if child is not None and is_kept:
            yield from _visit(_join(path, name), child, rules, replace)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name


def convertible_modules(model: nn.Module, rules: Rules) -> Iterator[nn.Module]:
    """Modules of a model that a conversion would replace, if the config says so."""
    by_type = resolve(rules)
    for _, module, _ in _visit("", model, by_type, lambda _path, kept: kept):
        if rule_for(module, by_type) not in (keep, keep_leaf):
            yield module


# Positions


def _plan_positions(inspection: Inspection, table: _Table, problems: list[str]) -> Positions | None:
    """For `positions="attention"`, replace the projections to queries, keys and values once more."""
    model: Any = inspection.model
    if inspection.config.positions == "keep" or isinstance(getattr(model, "positions", None), Positions):
        return None
    try:
        paths = attention_paths(model)
    except UnsupportedModuleError as refusal:
        problems += refusal.problems
        return None
    positions = Positions(model)
    for path in paths:
        old, qkv = table.rows.get(path, (None, None))
        if old is not None and isinstance(qkv, BcosLinear):
            table.rows[path] = Replacement(old, PositionedQkv.from_linear(qkv, positions))
        else:
            problems.append(f"{path}: positions='attention' needs a B-cos layer, not {type(qkv).__name__}")
    return positions


# Reading images

CONVERTED = "network"  # name of the converted model in a Sequential, as in published state dicts


def _image_reader(inspection: Inspection) -> ImageReader:
    like = next(inspection.model.parameters(), torch.empty(0))
    reader = ImageReader(inspection.channels, inspection.mean, inspection.std, buffer_device(like), like.dtype)
    return reader.train(inspection.model.training)


def _sequential(reader: ImageReader, converted: nn.Module) -> nn.Sequential:
    root = nn.Sequential(OrderedDict({"image_reader": reader, CONVERTED: converted}))
    root.training = converted.training
    return root


# What the converted model knows about itself


def _head_paths(model: nn.Module, table: _Table, prefix: str) -> dict[str, tuple[str, ...]]:
    """Paths of modules with pooling layers, with the names of the classifiers beside these.

    A classifier may have been wrapped since an earlier conversion, so names from that conversion stay.
    """
    new = {path: row.new for path, row in table.rows.items()}
    pools = [path for path, m in new.items() if isinstance(m, BcosPool2d | BcosFlatten) and path]
    classifiers = [path.rpartition(".") for path, m in new.items() if isinstance(m, BcosConvClassifier)]
    earlier = getattr(model, "head_paths", {})
    found = {}
    for head in dict.fromkeys(path.rpartition(".")[0] for path in pools):
        names = tuple(name for parent, _, name in classifiers if parent == head)
        found[_join(prefix, head)] = names or earlier.get(head, ())
    return found


def _described(converted: nn.Module, channels: int, table: _Table) -> dict[str, object]:
    """Attributes that other libraries read: images are in [0, 1], numbers of image channels and of classes."""
    found: dict[str, object] = {}
    if cfg := getattr(converted, "pretrained_cfg", None):
        count = len(cfg.get("mean") or (0, 0, 0))
        found["pretrained_cfg"] = dict(cfg, mean=(0.0,) * count, std=(1.0,) * count)
        found["default_cfg"] = found["pretrained_cfg"]
    if not hasattr(converted, "in_chans"):
        found["in_chans"] = channels
    classifiers = [m for m in table.modules() if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
    if not hasattr(converted, "num_classes") and classifiers:
        last = classifiers[-1]
        found["num_classes"] = last.out_channels if isinstance(last, BcosConvClassifier) else last.out_features
    return found


def _is_foldable(module: nn.Module) -> bool:
    return not isinstance(module, BcosConv2d | BcosLinear) and any(hasattr(type(module), name) for name in FOLDING)
