"""The Gradio app of `timm-bcos demo` and of Hugging Face Spaces."""

import contextlib
import io
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ..attribution.registry import METHODS
from ..errors import InputError
from ..models.class_names import class_names
from ..models.loading import TimmModel, load_model
from .components import file_url, frame, photo_input, static, theme
from .handlers import Handlers, is_slow
from .inference import MAX_CLASSES, DemoModel, embedded_models
from .limits import (
    CONCURRENT_CALLS,
    MAX_PHOTO_BYTES,
    MAX_SESSIONS,
    QUEUED_CALLS,
    SESSION_SECONDS,
    SLOW_QUEUE,
    SLOW_THREADS,
    LogLimit,
)
from .middleware import RequestFilter
from .sessions import MessageQueues
from .validation import CallValidator, Check, data_url, index_below, list_of, one_of, server_state

__all__ = ["App", "build_app", "demo_models", "launch", "serving"]

TITLE = "Explanations of B-cos models"
LEAD = (
    "The logit of a B-cos model is a sum of contributions of all pixels, so its explanation is exact. "
    "Photos are held in memory and never written to disk."
)
OTHERS = [name for name in METHODS if name != "bcos"]
DEFAULTS = ["input_x_gradient", "guided_backprop", "gradcam"]
SLOW = "Slow methods come last: " + ", ".join(filter(is_slow, OTHERS)) + "."
# Loggers that write a line or a traceback for invalid requests.
LOGGERS = ["asyncio", "uvicorn.error", *(f"{__package__}.{name}" for name in ("handlers", "middleware"))]

# `timm_bcos.demo.validation` checks calls before Gradio reads them; Gradio's own errors would list all choices.
EVENT: dict[str, Any] = dict(preprocess=False, api_visibility="private")
PHOTOS = EVENT | dict(concurrency_id="photos", concurrency_limit=CONCURRENT_CALLS)
SEARCHES = EVENT | dict(concurrency_id="searches", concurrency_limit=2)
# One call more than the scheduler takes, so that it is refused at once instead of waiting in Gradio's queue.
COMPARISONS = EVENT | dict(concurrency_id="comparisons", concurrency_limit=SLOW_THREADS + SLOW_QUEUE + 1)


class App(gr.Blocks):
    """The demo.

    Args:
        handlers: The functions behind its buttons and menus.
    """

    def __init__(self, handlers: Handlers) -> None:
        super().__init__(title="timm_bcos", analytics_enabled=False, fill_width=True)
        self.handlers = handlers
        self.checks: dict[int, tuple[str, Check]] = {}  # name and check of an argument, by the id of its component

    @property
    def validator(self) -> CallValidator:
        """Validates the calls of the handlers."""
        functions = {
            number: [self.checks[component._id] for component in function.inputs]
            for number, function in self.fns.items()
            if function.fn is not None
        }
        return CallValidator(functions)


def demo_models(
    model: str | None = None,
    checkpoint: Path | None = None,
    classes: Path | None = None,
    device: torch.device | str = "cpu",
    examples: Sequence[Path] = (),
) -> list[DemoModel]:
    """Load the given model, if any, and the embedded models.

    Args:
        model: Name of the model, as in `timm_bcos.models.loading.load_model`.
        checkpoint: File with weights, as there.
        classes: Class names of the given model, as in `timm_bcos.models.class_names.class_names`.
        device: Device to compute on.
        examples: Example photos for the given model. Default: those of the embedded models.

    Raises:
        CheckpointError: If weights cannot be loaded or do not fit.
        InputError: If the model cannot be created, or class names do not fit.
        TargetError: If timm does not know the name.
    """
    models = embedded_models()
    if (model, checkpoint, classes) != (None, None, None):
        module = load_model(model, checkpoint).eval()
        label = _label(module, model, checkpoint) or f"{models[0].label} with {classes}"
        photos = examples or [photo for embedded in models for photo in embedded.examples]
        models.insert(0, DemoModel(label, module, class_names(module, classes), photos))
    for one in models:
        one.module.to(device)
    return models


def _label(module: TimmModel, model: str | None, checkpoint: Path | None) -> str:
    """Name of a model in the menu. The files of checkpoints have the same few names, unlike their directories."""
    name = model or (module.pretrained_cfg["architecture"] if checkpoint else "")
    if checkpoint:
        return f"{checkpoint.resolve().parent.name}: {name}"
    return Path(name.removeprefix("local-dir:")).name if name.startswith("local-dir:") else name


def build_app(models: Sequence[DemoModel]) -> App:
    """Build the demo.

    Args:
        models: Models to choose from; the first is selected first.

    Returns:
        A Gradio app, whose queues limit how many calls run at the same time.
    """
    with App(Handlers(models)) as app:
        gr.HTML(f"<h1>{TITLE}</h1><p>{LEAD}</p>", elem_classes="bcos-title")
        layout = _Layout(models)
        _connect(app, layout)
    app.checks = {
        component._id: (name, check)
        for component, name, check in (
            (layout.prediction, "the prediction", server_state),
            (layout.photo, "the photo", data_url),
            (layout.label, "the model", one_of([model.label for model in models])),
            (layout.more, "the list of further classes", list_of(layout.a_class)),
            (layout.target, "the class", layout.a_class),
            (layout.methods, "the list of methods", list_of(one_of(OTHERS))),
            (layout.layer, "the layer", one_of({name for model in models for name in model.layers}, or_none=True)),
        )
    }
    return app.queue(max_size=QUEUED_CALLS, api_open=False)  # it returns itself


class _Layout:
    """The components of the demo, in the order in which they are shown."""

    def __init__(self, models: Sequence[DemoModel]) -> None:
        first = models[0]
        classes = [(name, index) for index, name in enumerate(first.names)]
        self.a_class = index_below(max(len(model.names) for model in models), or_none=True)
        self.prediction = gr.State(time_to_live=SESSION_SECONDS)
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                photo = file_url(first.examples[0]) if first.examples else ""
                self.photo = photo_input(photo, first.examples, elem_id="photo")
            with gr.Column(scale=4, min_width=300):
                labels = [model.label for model in models]
                self.label = gr.Dropdown(labels, value=first.label, label="Model", elem_id="model")
                self.more = gr.Dropdown(
                    classes, multiselect=True, value=[], label="Further classes", elem_id="more",
                    info=f"The most probable classes are always explained; up to {MAX_CLASSES} in all.",
                )  # fmt: skip
        self.notice = gr.HTML(elem_id="notice")
        self.explanation = frame(elem_id="explanation")
        with gr.Tab("Other methods"):
            with gr.Row():
                self.target = gr.Dropdown(classes, value=None, label="Class", scale=1, elem_id="target")
                self.methods = gr.Dropdown(
                    OTHERS, multiselect=True, value=DEFAULTS, label="Methods", info=SLOW, scale=3, elem_id="methods"
                )
            self.compare = gr.Button("Compare", variant="primary", elem_id="compare")
            self.maps = gr.HTML(elem_id="maps", min_height=60)
        with gr.Tab("Inner units"):
            self.layer = gr.Dropdown(first.layers, value=first.layer, label="Layer", elem_id="layer")
            self.show = gr.Button("Show the most active units", variant="primary", elem_id="show")
            self.units = gr.HTML(elem_id="units", min_height=60)


def _connect(app: App, layout: _Layout) -> None:
    """Connect the components with the handlers."""
    handlers = app.handlers
    comparison = layout.compare.click(
        handlers.compare, [layout.prediction, layout.target, layout.methods], layout.maps, **COMPARISONS
    )
    search = layout.show.click(handlers.show_units, [layout.prediction, layout.layer], layout.units, **SEARCHES)
    explain = PHOTOS | dict(
        fn=handlers.change_photo,
        inputs=[layout.label, layout.photo],
        outputs=[
            layout.notice,
            layout.explanation,
            layout.prediction,
            layout.more,
            layout.target,
            layout.maps,
            layout.units,
        ],
        cancels=[comparison, search],
    )
    layout.photo.input(**explain, trigger_mode="always_last")
    choices = [layout.photo, layout.more, layout.target, layout.layer]
    layout.label.input(handlers.change_model, [layout.label, layout.photo], choices, **PHOTOS).then(**explain)
    app.load(**explain)
    shown = [layout.notice, layout.explanation]
    layout.more.input(
        handlers.add_classes, [layout.prediction, layout.more], shown, trigger_mode="always_last", **PHOTOS
    )


@contextlib.contextmanager
def serving(app: App, port: int | None = None, share: bool = False) -> Iterator[str]:
    """Serve the demo until the block ends.

    Args:
        app: App from `build_app`.
        port: Port; None for the first free one from 7860.
        share: Also serve at a public address, through Gradio's servers.

    Yields:
        The address of the demo.

    Raises:
        InputError: If the port is taken, or Gradio provides no public address.
    """
    closing = threading.Event()
    app.handlers.open()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Gradio's own messages
            app.launch(
                server_port=port, share=share, inbrowser=False, prevent_thread_lock=True, quiet=True, inline=False,
                theme=theme(), css=static("demo.css"), footer_links=["gradio"], run_history=False,
                enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, max_file_size=MAX_PHOTO_BYTES,
                state_session_capacity=MAX_SESSIONS, app_kwargs=dict(lifespan=_lifespan(app, closing)),
            )  # fmt: skip
    except OSError as error:
        where = f"port {port} is" if port is not None else "all ports from 7860 are"
        raise InputError(f"{where} taken: choose a free one with --port") from error
    try:
        if share and not app.share_url:
            raise InputError("Gradio provides no public address: check the connection, or leave --share out")
        yield str(app.share_url or app.local_url)
    finally:
        closing.set()
        app.handlers.close()
        app.close(verbose=False)


def _lifespan(app: App, closing: threading.Event) -> Callable[[Any], contextlib.AbstractAsyncContextManager[None]]:
    @contextlib.asynccontextmanager
    async def lifespan(served: Any) -> AsyncIterator[None]:
        """Install the middleware here: Gradio would wrap middleware that is passed to it in its own."""
        validator, connected, queue = app.validator, app.handlers.connected, app._queue
        validators = {"/gradio_api/queue/join": validator.join, "/gradio_api/cancel": validator.cancel}
        served.middleware_stack = RequestFilter(served.middleware_stack, validators, connected, closing)
        queue.pending_messages_per_session = MessageQueues(connected, queue.pending_event_ids_session)  # type: ignore[assignment]
        with LogLimit().on(*LOGGERS):
            yield

    return lifespan


def launch(
    model: str | None = None,
    checkpoint: Path | None = None,
    classes: Path | None = None,
    *,
    port: int | None = None,
    share: bool = False,
    device: torch.device | str = "cpu",
    examples: Sequence[Path] = (),
) -> None:
    """Serve the demo until Ctrl-C. The `app.py` of a Hugging Face Space needs nothing else.

    Args:
        model: Name of the model, as in `demo_models`, for instance 'hf-hub:ORG/NAME'.
        checkpoint: File with weights, as in `demo_models`.
        classes: Class names, as in `demo_models`.
        port: Port, as in `serving`.
        share: Also serve at a public address, as in `serving`.
        device: Device to compute on.
        examples: Example photos, as in `demo_models`.

    Raises:
        BcosError: As in `demo_models` and `serving`.

    Example:
        >>> from timm_bcos.demo.app import launch
        >>> launch(model="hf-hub:ORG/NAME")
    """
    app = build_app(demo_models(model, checkpoint, classes, device, examples))
    with serving(app, port, share) as address:
        print(f"the demo is at {address} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:  # a wait without timeout misses a signal that arrives just before it
                time.sleep(0.2)
