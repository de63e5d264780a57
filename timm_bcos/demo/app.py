"""The page that `timm-bcos demo` and a Hugging Face Space show: Gradio around `timm_bcos.demo.visits`."""

import contextlib
import io
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import torch

from ..attribution.registry import METHODS
from ..errors import InputError
from ..models.class_names import class_names
from ..models.loading import load_model
from .calls import Calls, Kind, a_photo, one_of, several_of, the_visit, whole_number_below
from .components import frame, page_theme, photo_zone, static
from .guard import Guard
from .handlers import Answers, is_slow
from .limits import IN_QUEUE, LARGEST_PHOTO, REMEMBERED, SECONDS_OF_A_VISIT, SLOW_AT_ONCE, SLOW_WAITING, WAITING_AT_ONCE
from .log import FewLines
from .sessions import Mailboxes
from .uploads import encode_file
from .visits import MOST_CLASSES, DemoModel, embedded_networks

__all__ = ["build_app", "demo_models", "launch", "serving"]

TITLE = "What a B-cos network sees"
LEAD = (
    "A logit of a B-cos network is a sum over the pixels, so an explanation is exact: nothing is approximated. "
    "Photos are held in memory, never on disk."
)
OTHERS = [name for name in METHODS if name != "bcos"]
AT_FIRST = ["input_x_gradient", "guided_backprop", "gradcam"]
# Loggers that write a line, or a traceback, for what a stranger sends.
TELL_OF_STRANGERS = ["asyncio", "uvicorn.error", *(f"{__package__}.{name}" for name in ("answers", "guard"))]
SLOW = "Those that take long come last: " + ", ".join(filter(is_slow, OTHERS)) + "."

# Calls are checked before Gradio reads them (`timm_bcos.demo.calls`); its own check answers with all the choices.
EVENT: dict[str, Any] = dict(preprocess=False, api_visibility="private")
PHOTOS = EVENT | dict(concurrency_id="photos", concurrency_limit=WAITING_AT_ONCE)
SEARCHES = EVENT | dict(concurrency_id="searches", concurrency_limit=2)
# one more than find a place: the last is told at once that there is none
COMPARISONS = EVENT | dict(concurrency_id="comparisons", concurrency_limit=SLOW_AT_ONCE + SLOW_WAITING + 1)


class App(gr.Blocks):
    """The page.

    Args:
        answers: What it does.
    """

    def __init__(self, answers: Answers) -> None:
        super().__init__(title="timm_bcos", analytics_enabled=False, fill_width=True)
        self.answers = answers
        self.kinds: dict[int, tuple[str, Kind]] = {}  # by component, what an argument is called and may be

    @property
    def calls(self) -> Calls:
        """The calls that it answers."""
        functions = {
            number: [self.kinds[component._id] for component in function.inputs]
            for number, function in self.fns.items()
            if function.fn is not None
        }
        return Calls(functions)


def demo_models(
    model: str | None = None,
    checkpoint: Path | None = None,
    classes: Path | None = None,
    device: torch.device | str = "cpu",
    examples: Sequence[Path] = (),
) -> list[DemoModel]:
    """The networks that come with the package, after the one that is asked for.

    Args:
        model: As in `timm_bcos.models.loading.load_model`.
        checkpoint: As there.
        classes: Names of that network's classes, as in `timm_bcos.models.class_names.class_names`.
        device: Where to compute.
        examples: Photos for the network that is asked for; those of the others by default.

    Raises:
        CheckpointError: For weights that cannot be had or do not fit.
        InputError: For a network that cannot be made, or class names that do not fit.
        TargetError: For a name that timm does not know.
    """
    networks = embedded_networks()
    if (model, checkpoint, classes) != (None, None, None):
        network = load_model(model, checkpoint).eval()
        label = model or (checkpoint.name if checkpoint else f"{networks[0].label} with {classes}")
        photos = examples or [photo for embedded in networks for photo in embedded.examples]
        networks.insert(0, DemoModel(label, network, class_names(network, classes), photos))
    for one in networks:
        one.model.to(device)
    return networks


def build_app(networks: Sequence[DemoModel]) -> App:
    """The page.

    Args:
        networks: To choose from, the first being chosen at first.

    Returns:
        A Gradio app, whose queues limit how many answers are computed at once.
    """
    answers, first = Answers(networks), networks[0]
    classes = [(name, index) for index, name in enumerate(first.names)]
    with App(answers) as app:
        gr.HTML(f"<h1>{TITLE}</h1><p>{LEAD}</p>", elem_classes="bcos-title")
        visit = gr.State(time_to_live=SECONDS_OF_A_VISIT)
        with gr.Row():
            with gr.Column(scale=5, min_width=300):
                photo = photo_zone(_first_photo(first), first.examples, elem_id="photo")
            with gr.Column(scale=4, min_width=300):
                label = gr.Dropdown(list(answers.networks), value=first.label, label="Network", elem_id="network")
                more = gr.Dropdown(
                    classes, multiselect=True, value=[], label="Further classes", elem_id="more",
                    info=f"The most probable ones are explained anyway; up to {MOST_CLASSES} in all.",
                )  # fmt: skip
        told = gr.HTML(elem_id="told")
        explanation = frame(elem_id="explanation")
        with gr.Tab("Other methods"):
            with gr.Row():
                target = gr.Dropdown(classes, value=None, label="Class", scale=1, elem_id="target")
                methods = gr.Dropdown(
                    OTHERS, multiselect=True, value=AT_FIRST, label="Methods", info=SLOW, scale=3, elem_id="methods"
                )
            compare = gr.Button("Compare", variant="primary", elem_id="compare")
            maps = gr.HTML(elem_id="maps", min_height=60)
        with gr.Tab("Inner neurons"):
            layer = gr.Dropdown(first.layers, value=first.layer, label="Layer", elem_id="layer")
            show = gr.Button("Show the strongest units", variant="primary", elem_id="show")
            neurons = gr.HTML(elem_id="neurons", min_height=60)

        comparison = compare.click(answers.compare, [visit, target, methods], maps, **COMPARISONS)
        search = show.click(answers.show_neurons, [visit, layer], neurons, **SEARCHES)
        taking = PHOTOS | dict(
            fn=answers.take_photo,
            inputs=[label, photo],
            outputs=[told, explanation, visit, more, target, maps, neurons],
            cancels=[comparison, search],
        )
        photo.input(**taking, trigger_mode="always_last")
        label.input(answers.take_network, [label, photo], [photo, more, target, layer], **PHOTOS).then(**taking)
        app.load(**taking)
        more.input(answers.add_classes, [visit, more], [told, explanation], trigger_mode="always_last", **PHOTOS)

    a_class = whole_number_below(max(len(network.names) for network in networks), or_none=True)
    app.kinds = {
        visit._id: ("the visit", the_visit),
        photo._id: ("the photo", a_photo),
        label._id: ("the network", one_of(answers.networks)),
        more._id: ("the list of further classes", several_of(a_class)),
        target._id: ("the class", a_class),
        methods._id: ("the list of methods", several_of(one_of(OTHERS))),
        layer._id: ("the layer", one_of({name for network in networks for name in network.layers}, or_none=True)),
    }
    return app.queue(max_size=IN_QUEUE, api_open=False)  # type: ignore[return-value]  # it returns itself


def _first_photo(network: DemoModel) -> str:
    return encode_file(network.examples[0]) if network.examples else ""


@contextlib.contextmanager
def serving(app: App, port: int | None = None, share: bool = False) -> Iterator[str]:
    """Serve a page until the block ends.

    Args:
        app: From `build_app`.
        port: None for the first free one from 7860 on.
        share: Also at a public address, through Gradio's servers.

    Yields:
        Its address.

    Raises:
        InputError: If it cannot be served there.
    """
    closing, calls = threading.Event(), app.calls
    checks = {"/gradio_api/queue/join": calls.join, "/gradio_api/cancel": calls.cancel}

    @contextlib.asynccontextmanager
    async def guarded(served: Any) -> AsyncIterator[None]:
        """Before the first request: Gradio puts its own middleware around all that `middleware` can name."""
        listeners, queue = app.answers.listeners, app._queue
        served.middleware_stack = Guard(served.middleware_stack, checks, listeners, closing)
        queue.pending_messages_per_session = Mailboxes(listeners, queue.pending_event_ids_session)  # type: ignore[assignment]
        with FewLines().on(*TELL_OF_STRANGERS):
            yield

    app.answers.open()
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # Gradio's advice; the caller says what there is to say
            app.launch(
                server_port=port, share=share, inbrowser=False, prevent_thread_lock=True, quiet=True, inline=False,
                theme=page_theme(), css=static("page.css"), footer_links=["gradio"], run_history=False,
                enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, max_file_size=LARGEST_PHOTO,
                state_session_capacity=REMEMBERED, app_kwargs=dict(lifespan=guarded),
            )  # fmt: skip
    except OSError as error:
        where = f"port {port}" if port is not None else "any port from 7860 on"
        raise InputError(
            f"the page cannot be served at {where}, which is taken: choose a free one with --port"
        ) from error
    try:
        if share and not app.share_url:
            raise InputError("Gradio gives no public address now: check the connection, or leave --share out")
        yield str(app.share_url or app.local_url)
    finally:
        closing.set()
        app.answers.close()
        app.close(verbose=False)


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
    """Serve the page until Ctrl-C; all that the `app.py` of a Hugging Face Space needs.

    Args:
        model: As in `demo_models`, for instance 'hf-hub:ORG/NAME'.
        checkpoint: As there.
        classes: As there.
        port: As in `serving`.
        share: As in `serving`.
        device: Where to compute.
        examples: As in `demo_models`.

    Raises:
        BcosError: As in `demo_models` and `serving`.

    Example:
        >>> from timm_bcos.demo.app import launch
        >>> launch(model="hf-hub:ORG/NAME")
    """
    app = build_app(demo_models(model, checkpoint, classes, device, examples))
    with serving(app, port, share) as address:
        print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:  # a wait without end misses a signal that arrives just before it
                time.sleep(0.2)
