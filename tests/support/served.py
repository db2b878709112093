"""The service under uvicorn with two worker processes, and what their log says."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.support.servers import free_port

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 30.0
LEASE_SECONDS = 5.0  # a worker that has to wait for the processor must not lose it
WAIT_SECONDS = 30.0
# More than a worker is stopped for, less than the deadline: uvicorn's supervisor, asking a worker that is killed before
# it answers, waits this long before it starts another one or obeys a signal.
HEALTH_CHECK_SECONDS = 15


@dataclass
class Service:
    """Two workers on one port, and the log that they share."""

    store: str
    directory: Path
    options: tuple[str, ...] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.directory / "log.jsonl"

    @property
    def output(self) -> str:
        return (self.directory / "output.txt").read_text()

    def start(self) -> None:
        settings = {
            "store": self.store,
            "log": str(self.log),
            "lease_seconds": LEASE_SECONDS,
            "wait_timeout_seconds": WAIT_SECONDS,
            "max_response_bytes": 1024 * 1024,
            "has_check": False,
        } | self.settings
        command = [
            sys.executable,
            "-m",
            "uvicorn",
            "tests.support.service:app",
            "--workers",
            "2",
            "--port",
            str(self.port),
        ]
        quiet = ["--no-access-log", "--log-level", "warning", "--timeout-worker-healthcheck", str(HEALTH_CHECK_SECONDS)]
        with (self.directory / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                [*command, *quiet, *self.options],
                cwd=ROOT,
                env=os.environ | {"SERVICE": json.dumps(settings), "PYTHONFAULTHANDLER": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.wait_for_workers()

    def stop(self) -> int:
        """Ask it to leave, and return its exit code."""
        assert self.process is not None
        for pid in self.workers():
            os.kill(pid, signal.SIGCONT)
        self.process.terminate()
        try:
            return self.process.wait(DEADLINE_SECONDS)
        finally:
            for pid in self.workers():
                os.kill(pid, signal.SIGKILL)
            self.process.kill()
            self.process.wait()

    def workers(self) -> list[int]:
        """Return the pids of the workers that are there."""
        return [event["pid"] for event in self.events() if event["kind"] == "ready" and is_running(event["pid"])]

    def wait_for_workers(self) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while len(self.workers()) < 2:
            assert self.process is not None
            running = self.process.poll() is None and time.monotonic() < deadline
            assert running, f"two workers did not come: {self.last_words(self.process)}"
            time.sleep(0.02)

    def last_words(self, process: subprocess.Popen[bytes]) -> str:
        """End the supervisor and its children, and return the end of what they wrote and where they were."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            for pid in [*map(int, children), process.pid]:
                os.kill(pid, signal.SIGABRT)
                time.sleep(0.5)  # so that each is written as a whole
        return self.output[-8000:]

    def events(self, name: str | None = None) -> list[dict[str, Any]]:
        try:
            lines = self.log.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        events = [json.loads(line) for line in lines if line.endswith(b"\n")]
        return [event for event in events if name is None or event["key"] == name]

    def kinds(self, name: str) -> list[str]:
        return [event["kind"] for event in self.events(name)]

    def effects(self, name: str) -> list[str]:
        """Return the executions that began."""
        return [event["effect"] for event in self.events(name) if event["kind"] == "start"]

    def pid_of(self, name: str) -> int:
        """Return the worker in which the last execution began."""
        return [int(event["pid"]) for event in self.events(name) if event["kind"] == "start"][-1]

    async def wait_until(self, name: str, kind: str, *, times: int = 1) -> None:
        await until(lambda: self.kinds(name).count(kind) >= times, f"{kind} of {name}")

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncGenerator[httpx.AsyncClient]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=self.url, timeout=DEADLINE_SECONDS, limits=limits) as client:
            yield client


async def until(has_happened: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not has_happened():
        assert time.monotonic() < deadline, f"it did not happen: {what}"
        await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def is_stopped(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


@contextlib.contextmanager
def serving(store: str, directory: Path, *options: str, **settings: Any) -> Iterator[Service]:
    directory.mkdir(exist_ok=True)
    service = Service(store, directory, options, settings)
    try:
        service.start()
        yield service
    finally:
        service.stop()


async def post(client: httpx.AsyncClient, path: str, name: str, **options: Any) -> httpx.Response:
    """Send a request whose key is its name."""
    headers = {"idempotency-key": f'"{name}"', "x-name": name} | options.pop("headers", {})
    return await client.post(path, headers=headers, **{"json": {"amount": 42}} | options)


def is_replay(response: httpx.Response) -> bool:
    return response.headers.get("idempotent-replayed") == "true"


async def raw(service: Service, *pieces: bytes, until_seen: bytes | None = None) -> bytes:
    """Send bytes as they are; return what comes until the server closes, or until something is seen."""
    reader, writer = await asyncio.open_connection("127.0.0.1", service.port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await (reader.read(-1) if until_seen is None else reader.readuntil(until_seen))
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def raw_request(path: str, name: str, *headers: str, body: bytes = b"{}", close: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: service", f"x-name: {name}", "content-type: application/json", *headers]
    lines += ["connection: close"] if close else []
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
