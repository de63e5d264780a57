"""Numbers read out of a model's outputs, one per image: linear in the outputs, so that they can be explained."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..nn.module_utils import channel_axis, converted_part
from .regions import PositionGrid, position_indices, region_weights
from .request import Request, Target, as_direction, check_units

__all__ = ["ModelOutputs", "Selection", "channels_first", "model_outputs"]


@dataclass
class Selection:
    """What is explained of each image.

    Attributes:
        values: (N,) the numbers, on the graph.
        activations: (N, K) the outputs at the position, or their mean over the region; off the graph.
        unit: (N,) the unit; of a direction, the one that it weighs most.
        versus: (N,) the unit that is subtracted; None for none.
        direction: (N, K) where it is more than a unit, or than the difference of two.
        position: (N, 2) row and column; None for vectors and regions.
        region: (N, rows, columns) weights of the output's positions, which sum to 1; None for a position.
        shift: (N,) what the model gives outside of explanation mode, less `values`; None where that is not known.
    """

    values: Tensor
    activations: Tensor
    unit: Tensor
    versus: Tensor | None = None
    direction: Tensor | None = None
    position: Tensor | None = None
    region: Tensor | None = None
    shift: Tensor | None = None


@dataclass
class ModelOutputs:
    """A layer's outputs, or the model's.

    Attributes:
        maps: (N, K, P) K units at P positions, on the graph.
        grid: The positions.
        what: The units, in words.
        size: Height and width of the images in pixels.
        is_placed: Whether positions are told, as those of inner neurons and dense outputs are.
        shifts: (N, K, P) the outputs outside of explanation mode, less `maps`; None where they are not known.
    """

    maps: Tensor
    grid: PositionGrid
    what: str
    size: tuple[int, int]
    is_placed: bool
    shifts: Tensor | None = None

    def select(self, request: Request) -> Selection:
        """The number that is asked for, of each image."""
        target, versus, masks = request.target, request.versus, request.masks
        peaks, direction = self.maps.detach(), self._direction(target, versus)
        at, weights = None, None
        if masks is None:
            at = self._strongest(peaks, target, direction, self._place(request))
        else:
            weights = region_weights(masks.to(peaks), self.grid, self.size)
        pooled = _pooled(self.maps, at, weights)
        unit, against = self._units(target, pooled.detach(), direction), _units_of(versus)
        is_pair = against is not None and _units_of(target) is not None
        return Selection(
            _of_unit(pooled, unit, direction),
            pooled.detach(),
            unit,
            versus=against.to(unit.device) if is_pair and against is not None else None,
            direction=None if is_pair else direction,
            position=None if at is None or not self.is_placed else self._rows_and_columns(at),
            region=None if weights is None else self._on_grid(weights),
            shift=None if self.shifts is None else _of_unit(_pooled(self.shifts, at, weights), unit, direction),
        )

    def at(self, request: Request) -> Tensor:
        """(N, K) the outputs at the request's position, or their means over its region."""
        if request.masks is None:
            return _pooled(self.maps, self._place(request), None)
        return _pooled(self.maps, None, region_weights(request.masks.to(self.maps), self.grid, self.size))

    def _place(self, request: Request) -> Tensor | None:
        """(N,) numbers of the positions that are given, if there are any."""
        if request.position is None:
            return None
        return position_indices(request.position, self.grid, len(self.maps)).to(self.maps.device)

    def _direction(self, target: Target, versus: Target) -> Tensor | None:
        """(N, K), where not simply a unit is asked for."""
        images, count = self.maps.shape[:2]
        if target is None or (versus is None and _units_of(target) is not None):
            return None
        direction = as_direction(target, images, count, self.what)
        if versus is not None:
            direction = direction - as_direction(versus, images, count, self.what)
        return direction.to(self.maps)

    def _units(self, target: Target, pooled: Tensor, direction: Tensor | None) -> Tensor:
        units = _units_of(target)
        if units is None:
            return pooled.argmax(1) if direction is None else direction.argmax(1)
        check_units(units, pooled.shape[1], self.what)
        return units.to(pooled.device)

    def _strongest(self, peaks: Tensor, target: Target, direction: Tensor | None, place: Tensor | None) -> Tensor:
        """(N,) where what is asked for is largest, unless a place is given."""
        rows = torch.arange(len(peaks), device=peaks.device)
        if place is not None:
            return place
        if direction is not None:
            return (peaks * direction[:, :, None]).sum(1).argmax(1)
        return peaks[rows, self._units(target, peaks.amax(2), None)].argmax(1)

    def _rows_and_columns(self, at: Tensor) -> Tensor:
        return torch.stack([at // self.grid.columns, at % self.grid.columns], 1)

    def _on_grid(self, weights: Tensor) -> Tensor:
        return weights[:, self.grid.hidden :].unflatten(1, self.grid.shape)


def model_outputs(x: Tensor, model: nn.Module, layer: str | None, size: tuple[int, int]) -> ModelOutputs:
    """What a layer or the model returned, by units and positions.

    Args:
        x: (N, K), a feature map, or a sequence of tokens.
        model: The model.
        layer: Path of the layer; None for the model's output.
        size: Height and width of the images in pixels.
    """
    what = "classes" if layer is None else f"units in layer {layer!r}"
    maps = channels_first(x, model, layer)
    if x.ndim == 2:
        grid = PositionGrid(1, 1)
    elif x.ndim == 4:
        grid = PositionGrid(maps.shape[2], maps.shape[3])
    else:
        prefix = getattr(converted_part(model), "num_prefix_tokens", 0)
        grid = PositionGrid.of_tokens(maps.shape[2], prefix, size)
    return ModelOutputs(maps.flatten(2), grid, what, size, layer is not None or x.ndim > 2)


def channels_first(x: Tensor, model: nn.Module, layer: str | None) -> Tensor:
    """(N, C, ...) from an output in the format of a layer, or of the model; arguments as in `model_outputs`."""
    if x.ndim == 2:
        return x[:, :, None]
    module = model if layer is None else model.get_submodule(layer)
    return x.movedim(channel_axis(module, x, converted_part(model)), 1)


def _pooled(maps: Tensor, at: Tensor | None, weights: Tensor | None) -> Tensor:
    """(N, K, P) to (N, K): at a position of each image, or by weights (N, P)."""
    if at is not None:
        return maps[torch.arange(len(at), device=at.device), :, at]
    assert weights is not None
    return (maps * weights[:, None]).sum(2)


def _of_unit(pooled: Tensor, unit: Tensor, direction: Tensor | None) -> Tensor:
    """(N, K) to (N,): a unit of each image, or what a direction (N, K) weighs."""
    if direction is not None:
        return (pooled * direction).sum(1)
    return pooled[torch.arange(len(pooled), device=pooled.device), unit]


def _units_of(asked: Target) -> Tensor | None:
    """(N,) where units are asked for, not sets or directions."""
    return asked if isinstance(asked, Tensor) and not asked.is_floating_point() else None
