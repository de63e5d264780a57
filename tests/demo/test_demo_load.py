"""Many clients of the demo at once: batches of photos, slow methods, and an orderly shutdown."""

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.helpers import PHOTOS, load_script
from tests.helpers.slow import slow_but_for

pytest.importorskip("gradio")

from timm_bcos.demo import inference
from timm_bcos.demo.app import App, build_app, serving
from timm_bcos.demo.components import file_url
from timm_bcos.demo.handlers import IMAGES
from timm_bcos.demo.inference import DemoModel, embedded_models
from timm_bcos.demo.limits import SLOW_QUEUE, SLOW_THREADS, UNREAD_SESSIONS
from timm_bcos.demo.scheduler import CLOSING, Batcher, BusyError, ClosedError, Scheduler

load = load_script("demo_load")
HAT = PHOTOS / "clothes" / "hat.jpg"
SOON = 60  # seconds, in which what comes at once in practice has come


@pytest.fixture
def one_by_one() -> Iterator[Scheduler]:
    scheduler = Scheduler(quick=1)
    yield scheduler
    scheduler.close()


@pytest.fixture
def scheduler() -> Iterator[Scheduler]:
    scheduler = Scheduler()
    yield scheduler
    scheduler.close()


@pytest.fixture(scope="module")
def model() -> DemoModel:
    return embedded_models()[2]


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + SOON
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# ---- photos together ------------------------------------------------------------------------------------------------


def test_photos_together_are_explained_as_each_alone(model: DemoModel) -> None:
    images = [model.read(file_url(PHOTOS / "clothes" / f"{name}.jpg")) for name in ("hat", "pants", "shoes")]
    for image, (prediction, explanation) in zip(images, inference.explain_photos(model, images), strict=True):
        [(alone, expected)] = inference.explain_photos(model, [image])
        assert list(prediction.classes) == list(alone.classes) == explanation.target.tolist()
        assert torch.equal(prediction.image, image)
        torch.testing.assert_close(explanation.logit, expected.logit, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(explanation.weights, expected.weights, rtol=1e-3, atol=1e-4)
        with torch.no_grad():
            logits = model.module(image)[0, list(prediction.classes)]
        torch.testing.assert_close(explanation.logit, logits, rtol=1e-4, atol=1e-4)


class Sums:
    """Adds items up with their key, and notes what came together; it waits to be let go."""

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []
        self.may_begin = threading.Event()

    def __call__(self, key: "Number", items: Sequence[int]) -> list[int]:
        assert self.may_begin.wait(SOON)
        self.batches.append(tuple(items))
        if 13 in items:
            raise ValueError("13")
        return [key.value + item for item in items]


class Number:
    def __init__(self, value: int) -> None:
        self.value = value


def test_questions_that_wait_are_answered_together(one_by_one: Scheduler) -> None:
    sums, ten, hundred = Sums(), Number(10), Number(100)
    batcher: Batcher[Number, int, int] = Batcher(one_by_one, sums, max_batch=lambda _: 3)
    with ThreadPoolExecutor(12) as pool:
        first = pool.submit(batcher.run, ten, 0)
        assert eventually(lambda: not batcher._waiting and one_by_one._quick_tasks == 1)
        futures = []
        for count, (key, item) in enumerate([(ten, 1), (hundred, 2), (ten, 3), (ten, 4), (ten, 5), (hundred, 6)], 1):
            futures.append(pool.submit(batcher.run, key, item))
            assert eventually(lambda count=count: len(batcher._waiting) == count)  # type: ignore[misc]
        sums.may_begin.set()
        assert first.result(SOON) == 10
        assert [future.result(SOON) for future in futures] == [11, 102, 13, 14, 15, 106]
    assert sums.batches == [(0,), (1, 3, 4), (2, 6), (5,)]


def test_what_is_wrong_with_one_fails_no_other(one_by_one: Scheduler) -> None:
    sums, ten = Sums(), Number(10)
    batcher: Batcher[Number, int, int] = Batcher(one_by_one, sums, max_batch=lambda _: 3)
    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(batcher.run, ten, 0)
        assert eventually(lambda: not batcher._waiting and one_by_one._quick_tasks == 1)
        good, bad = pool.submit(batcher.run, ten, 1), pool.submit(batcher.run, ten, 13)
        assert eventually(lambda: len(batcher._waiting) == 2)
        sums.may_begin.set()
        assert first.result(SOON) == 10 and good.result(SOON) == 11
        with pytest.raises(ValueError, match="13"):
            bad.result(SOON)


# ---- slow methods ---------------------------------------------------------------------------------------------------


def endless(before_batch: Callable[[int], None]) -> None:
    while True:
        before_batch(1)
        time.sleep(0.001)


def test_slow_steps_let_quick_ones_go_first_and_stop_when_nobody_waits(scheduler: Scheduler) -> None:
    with scheduler.slow(endless) as job:
        assert eventually(lambda: job.started_images > 3)
        with scheduler.priority():
            time.sleep(0.05)  # the batch under way ends
            before = job.started_images
            assert scheduler.run(lambda: time.sleep(0.2)) is None
            assert job.started_images <= before + 1
        assert eventually(lambda: job.started_images > before + 3)
    assert job.wait(SOON)
    with pytest.raises(ClosedError, match="has disconnected"):
        job.result()


def test_a_slow_job_says_whether_its_client_or_the_demo_has_ended() -> None:
    closed = Scheduler()
    with closed.slow(endless) as job:
        assert eventually(lambda: job.started_images > 0)
        closed.close()
        with pytest.raises(ClosedError, match=CLOSING):
            job.result()


def test_only_so_many_slow_steps(scheduler: Scheduler) -> None:
    entered = [scheduler.slow(endless) for _ in range(SLOW_THREADS + SLOW_QUEUE)]
    jobs = [one.__enter__() for one in entered]
    with pytest.raises(BusyError, match="try again"), scheduler.slow(endless):
        pass
    assert eventually(lambda: sum(job.started_images > 0 for job in jobs) == SLOW_THREADS)
    for one in reversed(entered):
        one.__exit__(None, None, None)
    assert eventually(lambda: not scheduler._jobs)
    with scheduler.slow(lambda before_batch: 7) as job:
        assert job.wait(SOON) and job.result() == 7


@pytest.mark.parametrize("method", IMAGES)
def test_slow_methods_look_at_as_many_images_as_is_announced(model: DemoModel, method: str) -> None:
    pytest.importorskip("captum")
    pytest.importorskip("skimage")
    prediction, seen = inference.predict(model, file_url(HAT)), []
    watched = inference.attribution_map(prediction, 0, method, seen.append)
    assert abs(sum(seen) - IMAGES[method]) <= 10
    plain = inference.attribution_map(prediction, 0, method)
    assert plain.image is not None and watched.image is not None
    torch.testing.assert_close(watched.image, plain.image)


@pytest.fixture(scope="module")
def app() -> App:
    return build_app(embedded_models()[1:])


@pytest.fixture(scope="module")
def port(app: App) -> Iterator[int]:
    port = load.free_port()
    with serving(app, port):
        yield port


def announced(client: Any) -> str:
    """What a comparison shows before it begins with a slow method."""
    status, _ = client.join("compare", None, 0, ["rise"])
    assert status == 200
    with client.listening() as messages:
        message = next(message for message in messages if message["msg"] == "process_generating")
    return str(message["output"]["data"][0])


def test_a_comparison_says_how_long_it_takes_and_ends_with_its_client(app: App, port: int) -> None:
    client = load.Client(port)
    client.change_photo(HAT)
    assert "takes about" in announced(client)  # and then it hangs up
    assert eventually(lambda: not app.handlers.scheduler._jobs)
    assert eventually(lambda: client.session not in app.handlers.connected)


def test_a_comparison_that_nobody_listens_to_ends(app: App, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from timm_bcos.demo import handlers

    monkeypatch.setattr(handlers, "GRACE_SECONDS", 0.1)
    client = load.Client(port)
    client.change_photo(HAT)
    assert client.join("compare", None, 0, ["rise", "lime"])[0] == 200
    assert eventually(lambda: bool(app.handlers.scheduler._jobs))
    assert eventually(lambda: not app.handlers.scheduler._jobs)


def test_a_photo_is_explained_while_comparisons_run(app: App, port: int) -> None:
    client = load.Client(port)
    assert eventually(lambda: not app.handlers.scheduler._jobs)  # of tests before
    with load.comparisons(port, 2):
        assert eventually(lambda: len(app.handlers.scheduler._jobs) == 2)
        answer = client.change_photo(HAT)
        assert answer["success"] and "hat" in answer["output"]["data"][1]["document"]
        assert len(app.handlers.scheduler._jobs) == 2, "they have not been waited for"
    assert eventually(lambda: not app.handlers.scheduler._jobs)


def test_sessions_that_nobody_listens_to_shut_nobody_out(app: App, port: int) -> None:
    client = load.Client(port)
    client.change_photo(HAT)
    assert client.join("compare", None, 0, ["rise"])[0] == 200
    with client.listening() as messages:
        first = next(message for message in messages if message["msg"] == "process_generating")
        for number in range(UNREAD_SESSIONS + 20):
            other = load.Client(port, f"client{number}")
            assert other.join(client.functions["add_classes"], None, [])[0] == 200
        assert client.session in app._queue.pending_messages_per_session
        assert client.join("add_classes", None, [])[0] == 200
        kinds = []
        for message in messages:
            kinds.append(message["msg"])
            if message["msg"] == "process_completed" and message["event_id"] != first["event_id"]:
                break
    assert kinds[-1] == "process_completed" and "unexpected_error" not in kinds
    assert eventually(lambda: not app.handlers.scheduler._jobs)


# ---- the end --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", slow_but_for([signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]))
def test_a_signal_ends_in_order_and_tells_who_waits(number: signal.Signals) -> None:
    with load.demo(OMP_NUM_THREADS="1") as (process, port):
        client = load.Client(port)
        client.change_photo(HAT)
        assert client.join("compare", None, 0, ["rise", "occlusion"])[0] == 200
        with client.listening() as messages:
            next(message for message in messages if message["msg"] == "process_generating")
            process.send_signal(number)
            said = list(messages)
        _, error = process.communicate(timeout=SOON)
    assert process.returncode == 128 + number
    assert CLOSING in str(said[-1])
    assert error.splitlines() == [f"timm-bcos: stopped by {number.name}"]


def test_a_page_can_be_served_again(model: DemoModel) -> None:
    app = build_app([model])
    for _ in range(2):
        port = load.free_port()
        with serving(app, port):
            assert load.Client(port).change_photo(HAT)["success"]
    with pytest.raises(ClosedError):
        app.handlers.scheduler.run(lambda: None)
