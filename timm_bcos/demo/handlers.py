"""The event handlers of the demo: they call `timm_bcos.demo.inference` and show errors as messages."""

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
from . import inference
from .components import example_props, figures_html, file_url, frame_value, notice
from .inference import DemoModel, Figure, Prediction
from .limits import BATCH_SIZE, DECODING_THREADS, GRACE_SECONDS, POLL_SECONDS
from .scheduler import DISCONNECTED, Batcher, ClosedError, Scheduler, SlowJob
from .sessions import ConnectedSessions

__all__ = ["Handlers", "is_slow"]

T = TypeVar("T")

NO_PHOTO = "choose a photo first"
# Number of images that a method processes with its default options, and the cost of a gradient in forward passes.
IMAGES = {"rise": 500, "lime": 500, "occlusion": 226, "integrated_gradients": 50, "smoothgrad": 25}
GRADIENT_COST, GRADIENT_METHODS = 4, ("integrated_gradients", "smoothgrad")

_logger = logging.getLogger(__name__)


class Handlers:
    """The functions behind the demo's buttons and menus.

    Args:
        models: The models to choose from.

    Attributes:
        connected: The sessions whose clients listen; calls of other sessions are dropped.
    """

    def __init__(self, models: Sequence[DemoModel]) -> None:
        self.models = {model.label: model for model in models}
        self.examples = {file_url(photo) for model in models for photo in model.examples}
        self.connected = ConnectedSessions()
        self.decoding = BoundedSemaphore(DECODING_THREADS)
        self.open()

    def open(self) -> None:
        """Start the threads, also after `close`."""
        self.scheduler = Scheduler()
        self.photos: Batcher[DemoModel, Tensor, tuple[Prediction, Explanation]] = Batcher(
            self.scheduler, inference.explain_photos, lambda model: BATCH_SIZE.get(model.device.type, 1)
        )

    def close(self) -> None:
        """End what is being computed; waiting calls get an error."""
        self.scheduler.close()

    def change_photo(self, label: str, url: object) -> tuple[Any, ...]:
        """Explain a photo.

        Returns:
            Values of notice, explanation, prediction, further classes, compared class, maps and units.
        """
        found, problem = _attempt(lambda: self._explained(self.models[label], url))
        prediction, document, doubt = found or (None, "", "")
        best = prediction.classes[0] if prediction else None
        return (
            notice(problem or doubt),
            frame_value(document),
            prediction,
            gr.update(value=[]),
            gr.update(value=best),
            "",
            "",
        )

    def _explained(self, model: DemoModel, url: object) -> tuple[Prediction, str, str]:
        with self.scheduler.priority():
            with self.decoding:
                image = model.read(url)
            prediction, explanation = self.photos.run(model, image)
            document = self.scheduler.render(lambda: inference.render_explanation(prediction, explanation))
            return prediction, document, inference.doubt(prediction, explanation)

    def change_model(self, label: str, url: object) -> tuple[Any, ...]:
        """Show the choices of another model. An example photo is replaced by an example of the model.

        Returns:
            Updates of photo, further classes, compared class and layer.
        """
        model = self.models[label]
        classes = [(name, index) for index, name in enumerate(model.names)]
        photo: dict[str, Any] = dict(examples=example_props(model.examples))
        if (url in self.examples or not url) and model.examples:
            photo["value"] = file_url(model.examples[0])
        return (
            gr.update(**photo),
            gr.update(choices=classes, value=[]),
            gr.update(choices=classes, value=None),
            gr.update(choices=model.layers, value=model.layer),
        )

    def add_classes(self, prediction: Prediction | None, more: Sequence[int]) -> tuple[Any, ...]:
        """Explain further classes.

        Returns:
            Values of notice and explanation.
        """
        if prediction is None:
            return notice(NO_PHOTO), gr.skip()
        document, problem = _attempt(lambda: self.scheduler.run(lambda: inference.explain_classes(prediction, more)))
        return notice(problem), frame_value(document) if document else gr.skip()

    def compare(
        self,
        prediction: Prediction | None,
        target: int | None,
        methods: Sequence[str],
        request: gr.Request | None = None,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 - so that Gradio finds it
    ) -> Iterator[Any]:
        """Show the maps of several methods side by side, as they are computed; the model's own comes first.

        Slow methods come last, with an estimate of their duration, and stop when the client disconnects.
        """
        if prediction is None or target is None:
            yield notice(NO_PHOTO)
            return
        started, figures = time.monotonic(), list[Figure]()
        left = sorted(["bcos", *methods], key=is_slow)
        while left:
            method, *left = left
            task = partial(inference.attribution_map, prediction, target, method)
            if is_slow(method):
                yield figures_html([*figures, *(_placeholder(prediction, name) for name in (method, *left))])
                figure, problem = yield from self._run_slow(task, method, request, started, progress)
                if problem == DISCONNECTED:
                    return
            else:
                figure, problem = _attempt(lambda task=task: self.scheduler.run(task))  # type: ignore[misc]
            figures.append(figure or Figure(method, None, problem))
            if not left or not is_slow(left[0]):
                yield figures_html(figures)

    def _run_slow(
        self,
        task: Callable[..., Figure],
        method: str,
        request: gr.Request | None,
        started: float,
        progress: gr.Progress,
    ) -> Generator[Any, None, tuple[Figure | None, str]]:
        """Run a slow method. The empty updates let Gradio notice that a client has disconnected."""
        try:
            with self.scheduler.slow(lambda before_batch: task(before_batch=before_batch)) as job:
                while not job.wait(POLL_SECONDS):
                    if self._is_disconnected(request, started):
                        return None, DISCONNECTED
                    progress(*_progress_of(job, method))
                    yield gr.skip()
                return _attempt(job.result)
        except BcosError as error:
            return None, str(error)

    def _is_disconnected(self, request: gr.Request | None, started: float) -> bool:
        """Whether the client of a call does not listen, `GRACE_SECONDS` after the start."""
        is_connected = request is None or str(request.session_hash) in self.connected
        return not is_connected and time.monotonic() - started > GRACE_SECONDS

    def show_units(self, prediction: Prediction | None, layer: str | None, request: gr.Request | None = None) -> str:
        """Show the most active units of a layer."""
        if prediction is None or layer is None:
            return notice(NO_PHOTO)
        started = time.monotonic()

        def run(task: Callable[[], T]) -> T:
            if self._is_disconnected(request, started):
                raise ClosedError(DISCONNECTED)
            return self.scheduler.run(task)

        figures, problem = _attempt(lambda: inference.strongest_units(prediction, layer, run))
        return figures_html(figures) if figures else notice(problem)


def is_slow(method: str) -> bool:
    """Whether a method processes many images."""
    return METHODS[method].slow or method in IMAGES


def _placeholder(prediction: Prediction, method: str) -> Figure:
    """A figure that says how long a slow method takes."""
    seconds, images = prediction.model.seconds_per_image, IMAGES.get(method)
    if seconds is None or images is None:
        return Figure(method, None, "takes long")
    seconds *= images * (GRADIENT_COST if method in GRADIENT_METHODS else 1)
    return Figure(method, None, f"takes about {_duration(seconds)}, longer if other comparisons run")


def _duration(seconds: float) -> str:
    return f"{max(round(seconds), 1)} s" if seconds < 90 else f"{round(seconds / 60)} min"


def _progress_of(job: SlowJob, method: str) -> tuple[tuple[int, int | None], str]:
    """Arguments of `gr.Progress`: the started images and all images, and a description."""
    if not job.started_images:
        return (0, IMAGES.get(method)), f"{method} is waiting"
    return (job.started_images, IMAGES.get(method)), method


def _attempt(task: Callable[[], T]) -> tuple[T | None, str]:
    """The result of a task and an empty message, or None and an error message."""
    try:
        return task(), ""
    except BcosError as error:
        return None, str(error)
    except Exception as error:  # clients see no traceback; it is in the log
        _logger.exception("a handler failed")
        return None, f"internal error: {type(error).__name__}: {first_line(error)}"
