"""What a conversion will do: all of it is decided, and built, before anything is changed."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedModuleError
from ..nn.heads import BcosConvClassifier, BcosFlatten, BcosLinearClassifier, BcosPool2d
from ..nn.layers import BcosConv2d, BcosLinear
from ..nn.module_utils import buffer_device
from ..nn.stems import BcosStem, ImageReader
from .config import BcosConfig
from .positions import PositionedQkv, Positions, attention_paths
from .problems import computed_weight_problem, config_problems, reads_no_image, several_inputs, wrapper_problem
from .roles import IN_ORDER, LayerRoles
from .rules import ADVICE, Rule, Rules, is_container, keep, keep_leaf, resolve

__all__ = [
    "FOLDING",
    "Plan",
    "convertible",
    "has_hooks",
    "has_state_hooks",
    "move_hooks",
    "plan_conversion",
]

CALL_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
STATE_HOOKS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"
)  # fmt: skip


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the module's calls."""
    return any(getattr(module, name) for name in CALL_HOOKS)


def move_hooks(old: nn.Module, new: nn.Module) -> None:
    """Hang the hooks of calls on a module's replacement; handles that remove them keep working."""
    if old is new:
        return
    for name in CALL_HOOKS:
        hooks = old.__dict__[name]
        hooks.update(new.__dict__[name])
        new.__dict__[name] = hooks
    if new._is_full_backward_hook is None:
        new._is_full_backward_hook = old._is_full_backward_hook


def has_state_hooks(module: nn.Module) -> bool:
    """Whether somebody changes what the module's state dict holds."""
    return any(getattr(module, name) for name in STATE_HOOKS)


RulesByType = dict[type[nn.Module], Rule]
FOLDING = ("fuse", "reparameterize", "switch_to_deploy")  # methods that timm's `reparameterize_model` calls


@dataclass(frozen=True)
class Plan:
    """A conversion, decided and built in full; `timm_bcos.conversion.converted` carries it out.

    Attributes:
        model: The network, unchanged so far.
        network: What it will be: `model`, or what replaces it.
        root: `network`, or a Sequential of an `ImageReader` and the network.
        replacements: New modules by their path in `network`, parents first, itself excluded.
        attributes: What the root will say of itself, its config and its reader included.
        has_reader: Its forward methods will read the image first; elsewhere the reader is one of its layers.
        foldable: Modules of which something would be folded into a B-cos layer.
    """

    model: nn.Module
    network: nn.Module
    root: nn.Module
    replacements: dict[str, nn.Module]
    attributes: dict[str, object]
    has_reader: bool
    foldable: tuple[nn.Module, ...]


def plan_conversion(model: nn.Module, config: BcosConfig, rules: Rules) -> Plan:
    """Decide a conversion.

    Args:
        model: Stays as it is.
        config: What to convert to.
        rules: From exact module type, or its name, to rule.

    Raises:
        UnsupportedModuleError: With all that is in the way.
        InputError: For a mean or std of another number of channels than the image.
    """
    places = LayerRoles(model, config)
    found = _Replacements(model, config, resolve(rules), places)
    network = found.by_path[""]
    is_read = any(isinstance(m, BcosStem | ImageReader) for m in found.modules())
    problems = [*config_problems(model, config), *places.problems, *found.problems]
    problems += [] if is_read else [*several_inputs(network), *reads_no_image(model, places.channels)]
    positions = _plan_positions(model, config, found, problems)
    if problems:
        raise UnsupportedModuleError(problems)
    reader = None if is_read else _image_reader(model, places)
    is_wrapped = reader is not None and type(network).forward is nn.Sequential.forward  # would run it as a layer
    runs_first = reader is not None and isinstance(network, IN_ORDER)  # will
    return Plan(
        model=model,
        network=network,
        root=_read_through(reader, network) if reader is not None and is_wrapped else network,
        replacements={path: new for path, new in found.changed.items() if path},
        attributes=dict(
            bcos_config=config,
            bcos_rules=rules,
            head_paths={
                f"network.{path}".strip(".") if is_wrapped else path: names for path, names in found.heads().items()
            },
            **({} if reader is None or is_wrapped else dict(image_reader=reader)),
            **({} if positions is None else dict(positions=positions)),
            **_traits(network, places, found),
        ),
        has_reader=reader is not None and not is_wrapped and not runs_first,
        foldable=tuple(m for m in found.modules() if _is_foldable(m)),
    )


def _is_foldable(module: nn.Module) -> bool:
    return not isinstance(module, BcosConv2d | BcosLinear) and any(hasattr(type(module), name) for name in FOLDING)


@dataclass
class _Replacements:
    """A walk over a network that asks each module's rule.

    Attributes:
        by_path: What each module visited will be, parents first.
        changed: Those that will be something else.
        by_id: By the original's id; a module with several names is converted once.
        problems: What is in the way.
    """

    model: nn.Module
    config: BcosConfig
    rules: RulesByType
    places: "LayerRoles"
    by_path: dict[str, nn.Module] = field(default_factory=dict)
    changed: dict[str, nn.Module] = field(default_factory=dict)
    by_id: dict[int, nn.Module] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, module in _walk("", self.model, self.rules, self.by_id):
            if id(module) not in self.by_id:
                self.by_id[id(module)] = self._convert(name, module)
            new = self.by_path[name] = self.by_id[id(module)]
            if new is not module:
                self.changed[name] = new
        self.problems += self._lost_hooks()

    def _convert(self, name: str, module: nn.Module) -> nn.Module:
        """The module's replacement; itself where something is in the way."""
        rule = _rule_for(module, self.rules)
        advice = wrapper_problem(module) or (None if rule in (keep, keep_leaf) else computed_weight_problem(module))
        if rule is None or advice is not None:
            self.problems.append(_problem(name, module) if advice is None else f"{name or '(root)'}: {advice}")
            return module
        try:
            new = rule(module, self.places.of(name, module), self.config)
        except UnsupportedModuleError as refusal:
            self.problems += refusal.problems
            return module
        if new is not module and has_state_hooks(module):
            self.problems.append(
                f"{name or '(root)'}: has state dict hooks, made for the layer that it is: remove them, convert, and "
                f"register them again"
            )
        return new

    def modules(self) -> list[nn.Module]:
        """Those that the network will consist of."""
        return list({id(m): m for m in self._below("", self.by_path[""])}.values())

    def _below(self, path: str, module: nn.Module) -> Iterator[nn.Module]:
        yield module
        for name, child in module._modules.items():
            if child is not None:
                child_path = f"{path}.{name}" if path else name
                yield from self._below(child_path, self.by_path.get(child_path, child))

    def heads(self) -> dict[str, tuple[str, ...]]:
        """Paths of modules with pooling layers, and what classifiers beside those are called there.

        A classifier may have been wrapped since an earlier conversion: the names of then stay.
        """
        pooling = [path for path, m in self.by_path.items() if isinstance(m, BcosPool2d | BcosFlatten)]
        classifiers = [path for path, m in self.by_path.items() if isinstance(m, BcosConvClassifier)]
        before = getattr(self.model, "head_paths", {})
        parents = dict.fromkeys(path.rpartition(".")[0] for path in pooling if path)
        names = {p: tuple(c.rpartition(".")[2] for c in classifiers if c.rpartition(".")[0] == p) for p in parents}
        return {path: found or before.get(path, ()) for path, found in names.items()}

    def _lost_hooks(self) -> list[str]:
        hooked = [(name, m) for name, m in self.model.named_modules() if has_hooks(m) and id(m) not in self.by_id]
        if not hooked:
            return []
        staying = {id(m) for m in self.modules()}
        advice = "has hooks and goes away with the module around it: remove them"
        return [f"{name}: {advice}" for name, m in hooked if id(m) not in staying]


def _plan_positions(model: Any, config: BcosConfig, found: _Replacements, problems: list[str]) -> Positions | None:
    """Let a vision transformer's constants act in its attention only: its qkv projections are others then."""
    if config.positions == "keep" or isinstance(getattr(model, "positions", None), Positions):
        return None
    try:
        paths = attention_paths(model)
    except UnsupportedModuleError as refusal:
        problems += refusal.problems
        return None
    positions = Positions(model)
    for path in paths:
        qkv = found.by_path.get(path)
        if isinstance(qkv, BcosLinear):
            found.by_path[path] = found.changed[path] = PositionedQkv.from_linear(qkv, positions)
        else:
            problems.append(f"{path}: positions='attention' needs a B-cos layer, not {type(qkv).__name__}")
    return positions


def _image_reader(model: nn.Module, places: "LayerRoles") -> ImageReader:
    like = next(model.parameters(), torch.empty(0))
    reader = ImageReader(places.channels, places.mean, places.std, buffer_device(like), like.dtype)
    return reader.train(model.training)


def _read_through(reader: ImageReader, network: nn.Module) -> nn.Sequential:
    root = nn.Sequential(OrderedDict(image_reader=reader, network=network))
    root.training = network.training
    return root


def _traits(network: nn.Module, places: "LayerRoles", found: _Replacements) -> dict[str, object]:
    """What the network says of itself: images are in [0, 1], with so many channels, and so many classes."""
    traits: dict[str, object] = {}
    if cfg := getattr(network, "pretrained_cfg", None):
        channels = len(cfg.get("mean") or (0, 0, 0))
        traits["pretrained_cfg"] = dict(cfg, mean=(0.0,) * channels, std=(1.0,) * channels)
        traits["default_cfg"] = traits["pretrained_cfg"]
    if not hasattr(network, "in_chans"):
        traits["in_chans"] = places.channels
    classifiers = [m for m in found.modules() if isinstance(m, BcosConvClassifier | BcosLinearClassifier)]
    if not hasattr(network, "num_classes") and classifiers:
        last = classifiers[-1]
        traits["num_classes"] = last.out_channels if isinstance(last, BcosConvClassifier) else last.out_features
    return traits


def _walk(
    name: str, module: nn.Module, rules: RulesByType, done: dict[int, nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their paths, parents first, into whatever its rule has left in place."""
    yield name, module
    kept = done[id(module)]
    if _rule_for(module, rules) is keep_leaf or wrapper_problem(module) is not None:
        return
    for child_name, child in module._modules.items():  # `named_children` names a shared module only once
        is_kept = getattr(kept, child_name, None) is child
        if child is not None and is_kept:
            yield from _walk(f"{name}.{child_name}" if name else child_name, child, rules, done)


def convertible(model: nn.Module, rules: Rules) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a network, with their paths, that a conversion would replace if their config says so."""
    by_type = resolve(rules)
    for name, module in _walk("", model, by_type, {id(m): m for m in model.modules()}):
        if _rule_for(module, by_type) not in (keep, keep_leaf):
            yield name, module


def _rule_for(module: nn.Module, rules: RulesByType) -> Rule | None:
    kind = type(module)
    if kind in rules:
        return rules[kind]
    return keep if hasattr(module, "bcos_config") or is_container(module, rules) else None


def _problem(name: str, module: nn.Module) -> str:
    kind = type(module)
    place = f"{name or '(root)'}: "
    if kind in ADVICE:
        return f"{place}{kind.__module__}.{kind.__name__} {ADVICE[kind]}"
    return (
        f"{place}no rule for {kind.__module__}.{kind.__name__}; "
        f"pass rules=RULES | {{{kind.__name__}: rule}}, with rule=keep if explanation mode covers its forward"
    )
