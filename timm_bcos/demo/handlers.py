"""What each event on the page does: `timm_bcos.demo.visits`, with sentences in place of errors."""

import logging
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from threading import BoundedSemaphore
from typing import Any, TypeVar

import gradio as gr
from torch import Tensor

from ..attribution.registry import METHODS
from ..errors import BcosError
from ..explanation.result import Explanation
from ..files import first_line
from . import visits
from .components import example_props, framed, notice, pictures_side_by_side
from .guard import Listeners
from .limits import BATCH, DECODING, GRACE, TICK
from .uploads import encode_file
from .visits import DemoModel, Picture, Visit
from .work import ClosedError, Collector, SlowJob, Work

__all__ = ["Answers", "is_slow"]

T = TypeVar("T")

NO_VISIT = "choose a photo first"
NOBODY = "nobody waits for this any more"
# Images that a method looks at, with its default options, and how many passes one of them costs.
LOOKED_AT = {"rise": 500, "lime": 500, "occlusion": 226, "integrated_gradients": 50, "smoothgrad": 25}
GRADIENT_COST, GRADIENTS = 4, ("integrated_gradients", "smoothgrad")

_logger = logging.getLogger(__name__)


class Answers:
    """The functions behind the page's buttons and menus.

    Args:
        networks: To choose from.

    Attributes:
        listeners: The visitors who listen for answers; a call of nobody's is dropped.
    """

    def __init__(self, networks: Sequence[DemoModel]) -> None:
        self.networks = {network.label: network for network in networks}
        self.examples = {encode_file(photo) for network in networks for photo in network.examples}
        self.listeners = Listeners()
        self.decoding = BoundedSemaphore(DECODING)
        self.open()

    def open(self) -> None:
        """Begin, also after `close`."""
        self.work = Work()
        self.photos: Collector[DemoModel, Tensor, tuple[Visit, Explanation]] = Collector(
            self.work, visits.explain_photos, lambda network: BATCH.get(network.device.type, 1)
        )

    def close(self) -> None:
        """End what is being computed, and answer everybody who waits."""
        self.work.close()

    def take_photo(self, label: str, address: object) -> tuple[Any, ...]:
        """A photo, or another one.

        Returns:
            Notice, document, visit, further classes, compared class, and the two emptied panels.
        """
        found, problem = _attempt(lambda: self._explained(self.networks[label], address))
        visit, document = found or (None, "")
        best = visit.classes[0] if visit else None
        return notice(problem), framed(document), visit, gr.update(value=[]), gr.update(value=best), "", ""

    def _explained(self, network: DemoModel, address: object) -> tuple[Visit, str]:
        with self.work.asking():
            with self.decoding:
                image = network.read(address)
            visit, explanation = self.photos.ask(network, image)
            return visit, self.work.render(lambda: visits.document_of(visit, explanation))

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
        document, problem = _attempt(lambda: self.work.run(lambda: visits.explain_classes(visit, more)))
        return notice(problem), framed(document) if document else gr.skip()

    def compare(
        self,
        visit: Visit | None,
        target: int | None,
        methods: Sequence[str],
        request: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - so that Gradio finds it
    ) -> Iterator[Any]:
        """Maps of the chosen methods, side by side, as they are computed; the network's own comes first.

        Slow ones come last, with a word on how long they take, and are given up when nobody listens any more.
        """
        if visit is None or target is None:
            yield notice(NO_VISIT)
            return
        began, found = time.monotonic(), list[Picture]()
        left = sorted(["bcos", *methods], key=is_slow)
        while left:
            method, *left = left
            step = partial(visits.map_of_method, visit, target, method)
            if is_slow(method):
                yield pictures_side_by_side([*found, *(_announced(visit, name) for name in (method, *left))])
                picture, problem = yield from self._slow_map(step, method, request, began, progress)
                if self._is_given_up(request, began):
                    return
            else:
                picture, problem = _attempt(lambda step=step: self.work.run(step))  # type: ignore[misc]
            found.append(picture or Picture(method, None, problem))
            if not left or not is_slow(left[0]):
                yield pictures_side_by_side(found)

    def _slow_map(
        self, step: Callable[..., Picture], method: str, request: gr.Request | None, began: float, progress: gr.Progress
    ) -> Generator[Any, None, tuple[Picture | None, str]]:
        """Updates that change nothing, by which Gradio notices that a visitor has gone; then the map and a sentence."""
        try:
            with self.work.slow(lambda before_batch: step(before_batch=before_batch)) as job:
                while not job.is_done(TICK):
                    if self._is_given_up(request, began):
                        return None, NOBODY
                    progress(*_progress_of(job, method))
                    yield gr.skip()
                return _attempt(job.result)
        except BcosError as error:
            return None, str(error)

    def _is_given_up(self, request: gr.Request | None, began: float) -> bool:
        """Whether a call's visitor does not listen, some seconds after it began."""
        is_heard = request is None or str(request.session_hash) in self.listeners
        return not is_heard and time.monotonic() - began > GRACE

    def show_neurons(self, visit: Visit | None, layer: str | None, request: gr.Request | None = None) -> str:
        """A layer's strongest neurons."""
        if visit is None or layer is None:
            return notice(NO_VISIT)
        began = time.monotonic()

        def run(step: Callable[[], T]) -> T:
            if self._is_given_up(request, began):
                raise ClosedError(NOBODY)
            return self.work.run(step)

        pictures, problem = _attempt(lambda: visits.strongest_neurons(visit, layer, run))
        return pictures_side_by_side(pictures) if pictures else notice(problem)


def is_slow(method: str) -> bool:
    """Whether a method looks at many images."""
    return METHODS[method].slow or method in LOOKED_AT


def _announced(visit: Visit, method: str) -> Picture:
    """In the place of a slow method's map, how long it will take."""
    seconds, images = visit.network.seconds_per_image, LOOKED_AT.get(method)
    if seconds is None or images is None:
        return Picture(method, None, "takes long")
    seconds *= images * (GRADIENT_COST if method in GRADIENTS else 1)
    return Picture(method, None, f"takes about {_in_words(seconds)}, longer while others wait for theirs")


def _in_words(seconds: float) -> str:
    return f"{max(round(seconds), 1)} s" if seconds < 90 else f"{round(seconds / 60)} min"


def _progress_of(job: SlowJob, method: str) -> tuple[tuple[int, int | None], str]:
    """For `gr.Progress`: how many of how many images, and of what."""
    if not job.images:
        return (0, LOOKED_AT.get(method)), f"{method} waits for its turn"
    return (job.images, LOOKED_AT.get(method)), method


def _attempt(step: Callable[[], T]) -> tuple[T | None, str]:
    """What a step returns and no sentence, or nothing and the sentence to tell."""
    try:
        return step(), ""
    except BcosError as error:
        return None, str(error)
    except Exception as error:  # a stranger sees no traceback; whoever runs the page finds it in the log
        _logger.exception("an answer failed")
        return None, f"the page failed here: {type(error).__name__}: {first_line(error)}"
