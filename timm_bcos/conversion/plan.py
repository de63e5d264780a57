"""What a conversion will replace, decided before anything is changed."""

from collections.abc import Iterator
from fnmatch import fnmatch
from typing import Any

from timm.layers import SelectAdaptivePool2d
from torch import nn

from ..errors import BcosError, UnsupportedModuleError
from ..nn.stems import BcosStem, ImageReader
from .config import BcosConfig
from .rules import ADVICE, PROBABILITIES, Place, Rule, is_container, keep, keep_whole
from .statistics import Stats, image_statistics, reads_image_itself

__all__ = ["Places", "image_channels_of", "plan_replacements"]

Plan = dict[str, nn.Module]
AUXILIARY = ("AuxLogits", "aux1", "aux2")  # what timm and torchvision call their auxiliary heads


def plan_replacements(
    model: nn.Module, config: BcosConfig, rules: dict[type[nn.Module], Rule], places: "Places"
) -> Plan:
    """Every replacement by path, parents first; a module with several names is converted once."""
    plan: Plan = {}
    problems: list[str] = []
    done: dict[int, nn.Module] = {}
    for name, module in _walk("", model, rules, done):
        if id(module) not in done:
            rule = _rule_for(module, rules)
            if rule is None:
                problems.append(_problem(name, module))
                done[id(module)] = module
                continue
            try:
                done[id(module)] = rule(module, places.of(name, module), config)
            except UnsupportedModuleError as refusal:
                problems += refusal.problems
                done[id(module)] = module
        if done[id(module)] is not module:
            plan[name] = done[id(module)]
    if problems:
        raise UnsupportedModuleError(problems)
    return plan


def _walk(name: str, module: Any, rules: Any, done: dict[int, nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Modules with their paths, parents first, into whatever its rule has left in place."""
    yield name, module
    kept = done[id(module)]
    if _rule_for(module, rules) is keep_whole:
        return
    for child_name, child in module._modules.items():  # `named_children` names a shared module only once
        if child is not None and getattr(kept, child_name, None) is child:
            yield from _walk(f"{name}.{child_name}" if name else child_name, child, rules, done)


def _rule_for(module: nn.Module, rules: dict[type[nn.Module], Rule]) -> Rule | None:
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


class Places:
    """The role of each module: which reads the image, which gives the logits, which stay linear."""

    def __init__(self, model: nn.Module, config: BcosConfig) -> None:
        self.config = config
        self.model = model
        self.classifiers = _classifier_ids(model)
        is_fresh = not any(isinstance(m, BcosStem | ImageReader) for m in model.modules())
        self.stems = _stem_names(model) if is_fresh else ()
        self.needs_reader = is_fresh and not self.stems
        self.mean: Stats
        self.std: Stats
        self.mean, self.std = _normalisation(model, config) if is_fresh else (None, None)

    def of(self, name: str, module: nn.Module) -> Place:
        if name in self.stems:
            return Place(name, "stem", self.mean, self.std)
        if id(module) in self.classifiers:
            return Place(name, self._classifier_role(name))
        if any(fnmatch(name, pattern) for pattern in self.config.linear):
            return Place(name, "linear")
        return Place(name)

    def _classifier_role(self, name: str) -> str:
        """Whether the classifier's global pooling can be moved behind it."""
        parent = self.model.get_submodule(name.rpartition(".")[0])
        children = list(parent.children())
        own = next(i for i, m in enumerate(children) if id(m) in self.classifiers)
        if probabilities := [m for m in children[own + 1 :] if isinstance(m, PROBABILITIES)]:
            kind = type(probabilities[0]).__name__
            problem = (
                f"{name}: {kind} follows the classifier, while explanations are of logits: replace it by nn.Identity()"
            )
            raise UnsupportedModuleError([problem])
        is_pooled_later = any(isinstance(m, nn.AdaptiveAvgPool2d) for m in children[own + 1 :])
        if is_pooled_later and isinstance(children[own], nn.Conv2d):
            return "map"
        pools = [i for i, m in enumerate(children[:own]) if isinstance(m, SelectAdaptivePool2d)]
        if not pools or self.config.classify_positions == "never":
            return "classifier"
        pool: Any = children[pools[-1]]
        between = children[pools[-1] + 1 : own]
        transparent: tuple[type[nn.Module], ...] = (nn.Identity, nn.Dropout, nn.Flatten)
        if self.config.classify_positions == "always":
            transparent += (nn.LayerNorm,)
        if not all(isinstance(m, transparent) for m in between):
            return "classifier"
        # timm's pools for NHWC maps are others
        averages = isinstance(pool.pool, nn.AdaptiveAvgPool2d) and pool.pool.output_size in (1, (1, 1))
        return "positions" if averages else "map" if pool.is_identity() else "classifier"


def _classifier_ids(model: Any) -> set[int]:
    """timm models tell; elsewhere it is the last layer. Auxiliary heads count too."""
    if hasattr(model, "get_classifier"):
        found = model.get_classifier()
        heads = list(found) if isinstance(found, tuple | list) else [found]
    else:
        heads = _last_layers(model)
    auxiliary = [m for name, child in model.named_children() if name in AUXILIARY for m in _last_layers(child)]
    return {id(m) for m in [*heads, *auxiliary] if m is not None}


def _last_layers(model: nn.Module) -> list[nn.Module]:
    """The last linear layer, or, in a network without any, the last convolution."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    return [*(linear or convolutions)][-1:]


def _stem_names(model: Any) -> tuple[str, ...]:
    """The convolutions that read the image; none if something else does, which then needs an `ImageReader`.

    timm's cfg names them; elsewhere it is the first one with as many inputs as the image.
    """
    if reads_image_itself(model):
        return ()
    names = getattr(model, "pretrained_cfg", {}).get("first_conv") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    channels = image_channels_of(model)
    readers = [name for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.in_channels == channels]
    if names:
        return names if set(names) <= set(readers) else ()
    return tuple(readers[:1])


def image_channels_of(model: Any) -> int:
    """Channels of the images that a network takes; 3 where it does not say."""
    return getattr(model, "in_chans", 3)


def _normalisation(model: Any, config: BcosConfig) -> tuple[Stats, Stats]:
    if config.stem == "encoded":
        return None, None
    mean, std = image_statistics(model)
    mean, std = config.mean or mean, config.std or std
    if mean is None or std is None:
        raise BcosError(
            f"{type(model).__name__} does not say how its images are normalised: pass BcosConfig(mean=..., std=...), "
            f"or mean=(0.0,) and std=(1.0,) if it takes pixels in [0, 1]"
        )
    return tuple(mean), tuple(std)
