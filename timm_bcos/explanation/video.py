"""Explanations of films, frame by frame: the film and, beside it, what the model sees in each frame."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
import timm
import torch
from PIL import Image, ImageSequence
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..files import AUTHOR, atomic_path, first_line
from ..prefetch import prefetch
from .api import explain
from .inputs import refuse_stripes
from .result import Explanation
from .visualization import on_white

__all__ = ["VIDEO_SUFFIXES", "explain_video", "is_own_film"]

VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif")
CODECS = {".gif": ("gif", "pal8"), ".webm": ("libvpx-vp9", "yuv420p")}  # and pixels; all others hold H.264
FRAME_RATE = 10.0  # of films that do not say theirs
GIF_END = b"\x3b"
GIF_NOTE = b"\x21\xfe" + bytes([len(AUTHOR)]) + AUTHOR.encode() + b"\x00" + GIF_END  # a comment, before the end

Film = tuple[Iterator[np.ndarray], float, int | None]  # frames (H, W, 3), frames per second, their number if known


def explain_video(
    model: nn.Module, source: Path, out: Path, target: int | None = None, *, batch_size: int = 8
) -> Counter[int]:
    """Write a film of the frames, as the model sees them, and their explanations in color side by side.

    Frames are read, explained and written in small batches: memory does not grow with the film.

    Args:
        model: A B-cos model in eval mode.
        source: A film or an animated GIF.
        out: Output file, whose suffix selects the format. Written completely or not at all.
        target: A class; None explains the most probable one of each frame.
        batch_size: Number of frames per batch.

    Returns:
        How many frames were explained for each class.

    Raises:
        InputError: If the source is no film, or ends before its first frame.
    """
    cfg = timm.data.resolve_model_data_config(model)
    transform: Callable[[Image.Image], Tensor] = timm.data.create_transform(**cfg, is_training=False)
    device = next(model.parameters()).device
    frames, rate, count = (_open_gif if source.suffix.lower() == ".gif" else _open)(source)
    classes: Counter[int] = Counter()
    with atomic_path(out) as temporary, _writer(temporary, rate) as writer:
        progress = tqdm(total=count, unit="frame", desc=source.name, disable=None)
        batches = (
            torch.stack([transform(Image.fromarray(frame).convert("RGB")) for frame in batch])
            for batch in _batches(frames, batch_size)
        )
        for images in prefetch(batches):
            x = images.to(device)
            explanation = explain(model, x, target)
            classes.update(explanation.target.tolist())
            for picture in _side_by_side(x, explanation):
                writer.write(picture)
            progress.update(len(x))
        progress.close()
        if not classes:
            raise InputError(f"{source} has no frames")
    return classes


def _side_by_side(x: Tensor, explanation: Explanation) -> np.ndarray:
    """(N, H, 2W, 3) in 0..255, with even sides, as codecs want them."""
    both = torch.cat([x.movedim(1, -1).expand(-1, -1, -1, 3), on_white(explanation.to_rgba())], dim=2)
    even = both[:, : both.shape[1] // 2 * 2, : both.shape[2] // 2 * 2]
    return (even.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()


def _batches(frames: Iterator[np.ndarray], size: int) -> Iterator[list[np.ndarray]]:
    batch: list[np.ndarray] = []
    for frame in frames:
        batch.append(frame)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise InputError("films need PyAV: pip install 'timm_bcos[video]'") from error
    return av


def _open(path: Path) -> Film:
    av = _av()
    try:
        container = av.open(str(path))
        stream = container.streams.video[0]
    except FileNotFoundError:
        raise InputError(f"no film at {path}") from None
    except (av.FFmpegError, IndexError, OSError, ValueError) as error:
        raise InputError(f"{path} is no film: {first_line(error)}") from error

    def frames() -> Iterator[np.ndarray]:
        try:
            with container:
                for frame in container.decode(stream):
                    refuse_stripes((frame.width, frame.height))
                    yield frame.to_ndarray(format="rgb24")
        except InputError:
            raise
        except (av.FFmpegError, OSError, ValueError) as error:
            raise InputError(f"{path} is broken: {first_line(error)}") from error

    return frames(), float(stream.average_rate or FRAME_RATE), stream.frames or None


def _open_gif(path: Path) -> Film:
    """FFmpeg drops the frames of a GIF that gives no delays."""
    try:
        with Image.open(path) as image:
            refuse_stripes(image.size)
            delays = [_delay(frame) for frame in ImageSequence.Iterator(image)]
    except FileNotFoundError:
        raise InputError(f"no film at {path}") from None
    except InputError:
        raise
    except Exception as error:  # as decoders' errors differ
        raise InputError(f"{path} is no film: {first_line(error)}") from error

    def frames() -> Iterator[np.ndarray]:
        with Image.open(path) as image:
            for frame in ImageSequence.Iterator(image):
                yield np.asarray(frame.convert("RGB"))

    return frames(), 1000 * len(delays) / sum(delays), len(delays)


def _delay(frame: Image.Image) -> float:
    """How long a frame of a GIF stays, in milliseconds; the frame is whole."""
    frame.load()
    return float(frame.info.get("duration") or 1000 / FRAME_RATE)


def is_own_film(path: Path) -> bool:
    """Whether `explain_video` wrote a film."""
    if path.suffix.lower() == ".gif":
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - len(GIF_NOTE), 0))
            return file.read() == GIF_NOTE
    try:
        with _av().open(str(path)) as film:
            return AUTHOR in film.metadata.values()
    except Exception:  # no film at all
        return False


class _writer:  # noqa: N801  (reads as a verb: with _writer(path, rate))
    """Encodes frames as they come: H.264, VP9, or a GIF with a palette of its own for each frame."""

    def __init__(self, path: Path, rate: float) -> None:
        codec, pixels = CODECS.get(path.suffix.lower(), ("libx264", "yuv420p"))
        self.is_gif = codec == "gif"
        self.path = path
        self.container = _av().open(str(path), "w")
        self.container.metadata["comment"] = AUTHOR
        self.stream = self.container.add_stream(codec, Fraction(rate).limit_denominator(1000))
        self.stream.pix_fmt = pixels

    def write(self, picture: np.ndarray) -> None:
        pixels, layout = (_with_palette(picture), "pal8") if self.is_gif else (picture, "rgb24")
        frame = _av().VideoFrame.from_ndarray(pixels, format=layout)
        if not self.stream.codec_context.is_open:
            self.stream.height, self.stream.width = picture.shape[:2]
        self.container.mux(self.stream.encode(frame))

    def __enter__(self) -> "_writer":
        return self

    def __exit__(self, *failure: object) -> None:
        try:
            if failure[0] is None:
                self.container.mux(self.stream.encode(None))
        finally:
            self.container.close()
        if self.is_gif and failure[0] is None:  # FFmpeg writes no comments into GIFs
            with self.path.open("rb+") as file:
                file.seek(-len(GIF_END), os.SEEK_END)
                file.write(GIF_NOTE)


def _with_palette(picture: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices (H, W) into a palette (256, 4) of alpha and the picture's most useful colors."""
    image = Image.fromarray(picture).quantize(256)
    colors = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
    palette = np.full((256, 4), 255, np.uint8)
    palette[: len(colors), 1:] = colors
    return np.asarray(image), palette
