"""How long visitors of the demo page wait for a photo's explanation, alone and together, and what memory it takes.

    python scripts/benchmarks/demo_load.py                  # docs/serving.md quotes its numbers
    python scripts/benchmarks/demo_load.py --slow           # with two comparisons by slow methods beside the photos

It starts `timm-bcos demo` on a free port of this machine, asks it at most 200 times, and ends it. Only 127.0.0.1 is
asked.
"""

import argparse
import base64
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PHOTOS = sorted((Path(__file__).parents[1] / "photos").glob("*.jpg"))
SLOW = ["rise", "lime", "occlusion"]
SECONDS = 600  # after which a call is given up


class Visitor:
    """A visitor without a browser, who speaks with the page as its own scripts do.

    Args:
        port: Of the page, on this machine.
        session: Its name; a new one by default.

    Attributes:
        functions: Numbers of the page's functions, by name.
    """

    def __init__(self, port: int, session: str = "") -> None:
        self.port, self.session = port, session or uuid.uuid4().hex[:12]
        self._config: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """What the page says of itself in its HTML."""
        if self._config is None:
            _, html = self.request("GET", "/")
            found = re.search(r"window\.gradio_config = (\{.*?\});\s*(?:</script>|window\.)", html.decode(), re.DOTALL)
            assert found is not None, "the page has no configuration"
            self._config = json.loads(found[1])
        return self._config

    @property
    def functions(self) -> dict[str, int]:
        return {one["api_name"]: one["id"] for one in self.config["dependencies"] if one["backend_fn"]}

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of an answer; of a body that is no text, its JSON is sent."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            if body is not None and not isinstance(body, bytes):
                body, headers = json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def join(self, function: str | int, *arguments: Any, **others: Any) -> tuple[int, dict[str, Any]]:
        """Put a call into the queue: status and answer."""
        number = self.functions[function] if isinstance(function, str) else function
        call = {"data": list(arguments), "fn_index": number, "session_hash": self.session, **others}
        status, answer = self.request("POST", "/gradio_api/queue/join", call)
        return status, json.loads(answer or b"{}")

    @contextmanager
    def listening(self) -> Iterator[Iterator[dict[str, Any]]]:
        """The messages of this session, as they come."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=SECONDS)
        try:
            connection.request("GET", f"/gradio_api/queue/data?session_hash={self.session}")
            answer = connection.getresponse()
            yield (json.loads(line[6:]) for line in answer if line.startswith(b"data: "))
        finally:
            if connection.sock is not None:
                connection.sock.close()
            connection.close()

    def call(self, function: str | int, *arguments: Any) -> dict[str, Any]:
        """What a function answers in the end.

        Raises:
            RuntimeError: If it is refused.
        """
        status, joined = self.join(function, *arguments)
        if status != 200:
            raise RuntimeError(f"{status}: {joined.get('detail')}")
        with self.listening() as messages:
            last = next(message for message in messages if message["msg"] in ("process_completed", "unexpected_error"))
        return dict(last)

    def take_photo(self, photo: Path, network: str = "") -> dict[str, Any]:
        """A photo's explanation."""
        return self.call("take_photo", network or self.network, address_of(photo))

    @property
    def network(self) -> str:
        """The one that is chosen at first."""
        menu = next(one for one in self.config["components"] if one["props"].get("elem_id") == "network")
        return str(menu["props"]["value"])


def address_of(photo: Path) -> str:
    """A photo as a data address."""
    return f"data:image/jpeg;base64,{base64.b64encode(photo.read_bytes()).decode()}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def demo(*arguments: str, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """`timm-bcos demo` in a process of its own, and its port."""
    port = free_port()
    code = "from timm_bcos.__main__ import main; main()"
    command = [sys.executable, "-W", "ignore", "-c", code, "demo", "--port", str(port), *arguments]
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process, port
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def memory_of(pid: int) -> dict[str, float]:
    """GB that a process takes now, and has taken at most."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1e6 for name, key in (("now", "VmRSS"), ("most", "VmHWM"))}


def waits(visitors: list[Visitor], rounds: int) -> list[float]:
    """Seconds that every photo took, all visitors asking at once, one photo after the other."""

    def ask(number: int) -> list[float]:
        seconds = []
        for turn in range(rounds):
            started = time.perf_counter()
            answer = visitors[number].take_photo(PHOTOS[(number + turn) % len(PHOTOS)])
            assert answer["msg"] == "process_completed" and answer["success"], answer
            seconds.append(time.perf_counter() - started)
        return seconds

    with ThreadPoolExecutor(len(visitors)) as pool:
        return [one for many in pool.map(ask, range(len(visitors))) for one in many]


@contextmanager
def comparisons(port: int, count: int) -> Iterator[list[Visitor]]:
    """Visitors whose comparisons by slow methods run meanwhile; they leave when the block ends."""
    with ThreadPoolExecutor(count) as pool:
        visitors = [Visitor(port) for _ in range(count)]
        have_begun, have_left = threading.Barrier(count + 1), threading.Event()

        def compare(visitor: Visitor) -> None:
            visitor.take_photo(PHOTOS[0])
            visitor.join("compare", None, 0, SLOW)
            with visitor.listening() as messages:
                next(message for message in messages if message["msg"] == "process_generating")
                have_begun.wait()
                have_left.wait()

        for visitor in visitors:
            pool.submit(compare, visitor)
        have_begun.wait(SECONDS)
        try:
            yield visitors
        finally:
            have_left.set()


def told(name: str, seconds: list[float]) -> str:
    return f"| {name} | {len(seconds)} | {statistics.median(seconds):.2f} | {max(seconds):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--visitors", type=int, default=16, choices=range(1, 33), metavar="1-32")
    parser.add_argument("--slow", action="store_true", help="measure beside two comparisons by slow methods too")
    arguments = parser.parse_args()
    with demo() as (process, port):
        visitor = Visitor(port)
        start = memory_of(process.pid)
        waits([visitor], 2)  # what is loaded on first use
        print("| visitors | photos | median s | worst s |\n| --- | --- | --- | --- |")
        print(told("1", waits([visitor], 5)), flush=True)
        if arguments.slow:
            with comparisons(port, 2):
                print(told("1, beside two slow comparisons", waits([visitor], 5)), flush=True)
        many = [Visitor(port) for _ in range(arguments.visitors)]
        print(told(str(arguments.visitors), waits(many, 4)), flush=True)
        photos = memory_of(process.pid)
        visitor.call("show_neurons", None, "blocks.4")
        neurons = memory_of(process.pid)
    print("\n| memory, GB | now | at most so far |\n| --- | --- | --- |")
    for name, memory in (("at the start", start), ("after the photos", photos), ("after a layer's neurons", neurons)):
        print(f"| {name} | {memory['now']:.2f} | {memory['most']:.2f} |")


if __name__ == "__main__":
    main()
