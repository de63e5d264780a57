"""What each event on the page does: `timm_bcos.page.visits`, with sentences in place of errors."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import gradio as gr

from ..errors import BcosError
from ..files import first_line
from . import visits
from .components import example_props, framed
from .markup import notice, pictures_side_by_side
from .networks import PageNetwork
from .uploads import encode_file
from .visits import Picture, Visit

__all__ = ["Answers"]

T = TypeVar("T")

NO_VISIT = "choose a photo first"

_logger = logging.getLogger(__name__)


class Answers:
    """The functions behind the page's buttons and menus.

    Args:
        networks: To choose from.
    """

    def __init__(self, networks: Sequence[PageNetwork]) -> None:
        self.networks = {network.label: network for network in networks}
        self.examples = {encode_file(photo) for network in networks for photo in network.examples}

    def take_photo(self, label: str, address: object) -> tuple[Any, ...]:
        """A photo, or another one.

        Returns:
            Notice, document, visit, further classes, compared class, and the two emptied panels.
        """
        network = self.networks[label]
        visit, problem = _attempt(lambda: visits.begin(network, address))
        document, problem = _attempt(lambda: visits.explain_classes(visit)) if visit else (None, problem)
        best = visit.classes[0] if visit else None
        return notice(problem), framed(document or ""), visit, gr.update(value=[]), gr.update(value=best), "", ""

    def take_network(self, label: str, address: object) -> tuple[Any, ...]:
        """Another network; one of the examples gives way to one that suits it.

        Returns:
            Photo, further classes, compared class, layer; all with the network's own choices.
        """
        network = self.networks[label]
        classes = [(name, index) for index, name in enumerate(network.names)]
        photo: dict[str, Any] = dict(examples=example_props(network.examples))
        if (address in self.examples or not address) and network.examples:
            photo["value"] = encode_file(network.examples[0])
        return (
            gr.update(**photo),
            gr.update(choices=classes, value=[]),
            gr.update(choices=classes, value=None),
            gr.update(choices=network.layers, value=network.layer),
        )

    def add_classes(self, visit: Visit | None, more: Sequence[int]) -> tuple[Any, ...]:
        """Further classes.

        Returns:
            Notice and document.
        """
        if visit is None:
            return notice(NO_VISIT), gr.skip()
        document, problem = _attempt(lambda: visits.explain_classes(visit, more))
        return notice(problem), framed(document) if document else gr.skip()

    def compare(
        self,
        visit: Visit | None,
        target: int | None,
        methods: Sequence[str],
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - so that Gradio finds it
    ) -> Iterator[str]:
        """Maps of the chosen methods, side by side, as they are computed; the network's own comes first."""
        if visit is None or target is None:
            yield notice(NO_VISIT)
            return
        found: list[Picture] = []
        for method in progress.tqdm(["bcos", *methods], desc="Methods", unit="methods"):
            picture, problem = _attempt(partial(visits.map_of_method, visit, target, method))
            found.append(picture or Picture(method, None, problem))
            yield pictures_side_by_side(found)

    def show_neurons(self, visit: Visit | None, layer: str | None) -> str:
        """A layer's strongest neurons."""
        if visit is None or layer is None:
            return notice(NO_VISIT)
        pictures, problem = _attempt(lambda: visits.strongest_neurons(visit, layer))
        return pictures_side_by_side(pictures) if pictures else notice(problem)


def _attempt(step: Callable[[], T]) -> tuple[T | None, str]:
    """What a step returns and no sentence, or nothing and the sentence to tell."""
    try:
        return step(), ""
    except BcosError as error:
        return None, str(error)
    except Exception as error:  # a stranger sees no traceback; whoever runs the page finds it in the log
        _logger.exception("an answer failed")
        return None, f"the page failed here: {type(error).__name__}: {first_line(error)}"
