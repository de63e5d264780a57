"""Measure how long clients of the demo wait for a photo's explanation, and the memory of the demo.

    python scripts/benchmarks/demo_load.py                  # docs/serving.md quotes its numbers
    python scripts/benchmarks/demo_load.py --slow           # also while two comparisons by slow methods run

It starts `timm-bcos demo` on a free port of 127.0.0.1, sends at most 200 requests, and ends it.
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
SECONDS = 600  # timeout of a call


class Client:
    """A client without a browser, with the requests of Gradio's scripts.

    Args:
        port: Port of the demo on 127.0.0.1.
        session: Name of the session. Default: a random name.

    Attributes:
        functions: Indices of the handlers, by name.
    """

    def __init__(self, port: int, session: str = "") -> None:
        self.port, self.session = port, session or uuid.uuid4().hex[:12]
        self._config: dict[str, Any] | None = None

    @property
    def config(self) -> dict[str, Any]:
        """Gradio's configuration, as the HTML contains it."""
        if self._config is None:
            _, html = self.request("GET", "/")
            found = re.search(r"window\.gradio_config = (\{.*?\});\s*(?:</script>|window\.)", html.decode(), re.DOTALL)
            assert found is not None, "the HTML has no configuration"
            self._config = json.loads(found[1])
        return self._config

    @property
    def functions(self) -> dict[str, int]:
        return {one["api_name"]: one["id"] for one in self.config["dependencies"] if one["backend_fn"]}

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
        """Status and body of the response. A body other than bytes is sent as JSON."""
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
        """Queue a call; returns status and response."""
        number = self.functions[function] if isinstance(function, str) else function
        call = {"data": list(arguments), "fn_index": number, "session_hash": self.session, **others}
        status, answer = self.request("POST", "/gradio_api/queue/join", call)
        return status, json.loads(answer or b"{}")

    @contextmanager
    def listening(self) -> Iterator[Iterator[dict[str, Any]]]:
        """The messages of this session, as they arrive."""
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
        """Call a handler and wait for its last message.

        Raises:
            RuntimeError: If it is refused.
        """
        status, joined = self.join(function, *arguments)
        if status != 200:
            raise RuntimeError(f"{status}: {joined.get('detail')}")
        with self.listening() as messages:
            last = next(message for message in messages if message["msg"] in ("process_completed", "unexpected_error"))
        return dict(last)

    def change_photo(self, photo: Path, model: str = "") -> dict[str, Any]:
        """Explain a photo."""
        return self.call("change_photo", model or self.model, data_url(photo))

    @property
    def model(self) -> str:
        """The model that is selected first."""
        menu = next(one for one in self.config["components"] if one["props"].get("elem_id") == "model")
        return str(menu["props"]["value"])


def data_url(photo: Path) -> str:
    """A photo as a data URL."""
    return f"data:image/jpeg;base64,{base64.b64encode(photo.read_bytes()).decode()}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def demo(*arguments: str, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Start `timm-bcos demo`; yields the process and its port."""
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
    """Current and peak memory of a process in GB."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(lines[key].split()[0]) / 1e6 for name, key in (("now", "VmRSS"), ("most", "VmHWM"))}


def waits(clients: list[Client], rounds: int) -> list[float]:
    """Seconds per photo, while all clients send photos one after the other."""

    def ask(number: int) -> list[float]:
        seconds = []
        for turn in range(rounds):
            started = time.perf_counter()
            answer = clients[number].change_photo(PHOTOS[(number + turn) % len(PHOTOS)])
            assert answer["msg"] == "process_completed" and answer["success"], answer
            seconds.append(time.perf_counter() - started)
        return seconds

    with ThreadPoolExecutor(len(clients)) as pool:
        return [one for many in pool.map(ask, range(len(clients))) for one in many]


@contextmanager
def comparisons(port: int, count: int) -> Iterator[list[Client]]:
    """Run comparisons by slow methods, one per client, while the block runs."""
    with ThreadPoolExecutor(count) as pool:
        clients = [Client(port) for _ in range(count)]
        have_begun, have_left = threading.Barrier(count + 1), threading.Event()

        def compare(client: Client) -> None:
            client.change_photo(PHOTOS[0])
            client.join("compare", None, 0, SLOW)
            with client.listening() as messages:
                next(message for message in messages if message["msg"] == "process_generating")
                have_begun.wait()
                have_left.wait()

        for client in clients:
            pool.submit(compare, client)
        have_begun.wait(SECONDS)
        try:
            yield clients
        finally:
            have_left.set()


def table_row(name: str, seconds: list[float]) -> str:
    return f"| {name} | {len(seconds)} | {statistics.median(seconds):.2f} | {max(seconds):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=16, choices=range(1, 33), metavar="1-32")
    parser.add_argument("--slow", action="store_true", help="also measure while two comparisons by slow methods run")
    arguments = parser.parse_args()
    with demo() as (process, port):
        client = Client(port)
        start = memory_of(process.pid)
        waits([client], 2)  # warm-up
        print("| clients | photos | median s | worst s |\n| --- | --- | --- | --- |")
        print(table_row("1", waits([client], 5)), flush=True)
        if arguments.slow:
            with comparisons(port, 2):
                print(table_row("1, beside two slow comparisons", waits([client], 5)), flush=True)
        many = [Client(port) for _ in range(arguments.clients)]
        print(table_row(str(arguments.clients), waits(many, 4)), flush=True)
        photos = memory_of(process.pid)
        client.call("show_units", None, "blocks.4")
        neurons = memory_of(process.pid)
    print("\n| memory, GB | now | at most so far |\n| --- | --- | --- |")
    for name, memory in (("at the start", start), ("after the photos", photos), ("after a layer's neurons", neurons)):
        print(f"| {name} | {memory['now']:.2f} | {memory['most']:.2f} |")


if __name__ == "__main__":
    main()
