"""The page that `timm-bcos demo` and a Hugging Face Space show: Gradio around `timm_bcos.page.visits`."""

import contextlib
import io
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import gradio as gr
from starlette.middleware import Middleware

from ..attribution.registry import METHODS
from ..errors import BcosError, InputError
from ..files import first_line
from ..models.classes import class_names
from ..models.loading import load_model
from . import visits
from .components import Frame, PhotoZone, example_props, static
from .guard import Guard
from .markup import notice, pictures_side_by_side
from .networks import PageNetwork, embedded_networks
from .uploads import LARGEST, encode_file

__all__ = ["build_app", "launch", "page_networks", "serving"]

T = TypeVar("T")

_logger = logging.getLogger(__name__)

TITLE = "What a B-cos network sees"
LEAD = (
    "Logits of a B-cos network are sums over the pixels, so that an explanation is exact: nothing is approximated. "
    "Photos stay in memory, and only for the answer."
)
FAST = ("ixg", "guided_backprop", "gradcam")  # what is compared at first
AT_ONCE, WAITING, SESSIONS = 2, 32, 200  # answers computed, answers waited for, visitors remembered
REQUEST = LARGEST * 4 // 3 + 1_000_000  # bytes: a photo as a data address, and what goes with it


def page_networks(
    model: str | None = None, checkpoint: Path | None = None, classes: Path | None = None, device: object = "cpu"
) -> list[PageNetwork]:
    """The networks that come with the package, after the one that is asked for.

    Args:
        model: As in `timm_bcos.models.loading.load_model`.
        checkpoint: As there.
        classes: Names of that network's classes, as in `timm_bcos.models.classes.class_names`.
        device: Where to compute.

    Raises:
        CheckpointError: For weights that cannot be had or do not fit.
        InputError: For a network that cannot be made, or class names that do not fit.
        TargetError: For a name that timm does not know.
    """
    networks = embedded_networks()
    if model is not None or checkpoint is not None or classes is not None:
        network = load_model(model, checkpoint).eval()
        examples = [photo for embedded in networks for photo in embedded.examples]
        label = str(model or (checkpoint and checkpoint.name) or networks[0].label)
        networks.insert(0, PageNetwork(label, network, class_names(network, classes), examples))
    for one in networks:
        one.model.to(device)
    return networks


def build_app(networks: Sequence[PageNetwork]) -> gr.Blocks:
    """The page.

    Args:
        networks: To choose from, the first being chosen at first.

    Returns:
        A Gradio app, whose queue limits how many answers are computed at once.
    """
    offered = {network.label: network for network in networks}
    first = networks[0]
    with gr.Blocks(title="timm_bcos", analytics_enabled=False) as app:
        gr.HTML(f"<h1>{TITLE}</h1><p>{LEAD}</p>", elem_classes="bcos-title")
        with gr.Row(equal_height=True):
            with gr.Column(scale=5, min_width=300):
                photo = PhotoZone(_first_example(first), examples=example_props(first.examples), elem_id="photo")
            with gr.Column(scale=4, min_width=300):
                label = gr.Dropdown(list(offered), value=first.label, label="Network", elem_id="network")
                more = gr.Dropdown([], multiselect=True, label="Further classes", info=MORE, elem_id="more")
        told = gr.HTML(elem_id="told")
        frame = Frame(elem_id="explanation")
        visit = gr.State(time_to_live=3600)
