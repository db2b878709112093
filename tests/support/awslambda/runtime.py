"""Lambda's side of its runtime API, and processes that run Lambda's own runtime client against it.

    async with environment("async_handler", variables, tmp_path / "output") as lambda_:
        answer = await lambda_.invoke({"order": 1})
        assert answer == Answer(result={"charged": 1})

https://docs.aws.amazon.com/lambda/latest/dg/runtimes-api.html
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
PATIENCE_SECONDS = 50.0
RUNTIME = "/2018-06-01/runtime"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a function made of an invocation."""

    result: Any = None
    error_type: str | None = None


@dataclass
class Invocation:
    """An event on its way to a function and back."""

    event: Any
    deadline: float
    answer: asyncio.Future[Answer] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass
class RuntimeApi:
    """Serves one execution environment.

    Attributes:
        ready: Set when the function has been initialized and asks for its first event.
        snapshot: Set when it may be taken.
        restored: To be set when it has been restored.
        init_error: What the function reported instead.
    """

    ready: asyncio.Event = field(default_factory=asyncio.Event)
    snapshot: asyncio.Event = field(default_factory=asyncio.Event)
    restored: asyncio.Event = field(default_factory=asyncio.Event)
    init_error: bytes | None = None
    _connections: set[asyncio.Task[None]] = field(default_factory=set)
    _events: asyncio.Queue[Invocation] = field(default_factory=asyncio.Queue)
    _under_way: dict[str, Invocation] = field(default_factory=dict)
    _ids: itertools.count[int] = field(default_factory=itertools.count)

    def send(self, event: Any, *, deadline_seconds: float) -> Invocation:
        invocation = Invocation(event, time.time() + deadline_seconds)
        self._events.put_nowait(invocation)
        return invocation

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(connection)
        connection.add_done_callback(self._connections.discard)
        await asyncio.wait({connection})

    async def aclose(self) -> None:
        for connection in self._connections:
            connection.cancel()
        while self._connections:
            await asyncio.wait(self._connections)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError), contextlib.closing(writer):
            while request := await reader.readline():
                method, path, _ = request.decode().split()
                headers: dict[str, str] = {}
                while line := (await reader.readline()).decode().strip():
                    name, _, value = line.partition(":")
                    headers[name.lower()] = value.strip()
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                status, fields, answer = await self._answer(method, path.removeprefix(RUNTIME), body)
                fields |= {"Content-Type": "application/json", "Content-Length": str(len(answer))}
                head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
                writer.write(f"HTTP/1.1 {status} X\r\n{head}\r\n".encode() + answer)
                await writer.drain()

    async def _answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        match method, *path.split("/")[1:]:
            case "GET", "invocation", "next":
                self.ready.set()
                return await self._next_event()
            case "GET", "restore", "next":
                self.snapshot.set()
                await self.restored.wait()
                return 200, {}, b""
            case "POST", "invocation", request_id, "response":
                self._under_way.pop(request_id).answer.set_result(Answer(result=json.loads(body)))
            case "POST", "invocation", request_id, "error":
                error_type = json.loads(body)["errorType"]
                self._under_way.pop(request_id).answer.set_result(Answer(error_type=error_type))
            case _:  # /init/error, /restore/error
                self.init_error = body
        return 202, {}, b""

    async def _next_event(self) -> tuple[int, dict[str, str], bytes]:
        invocation = await self._events.get()
        request_id = f"request-{next(self._ids)}"
        self._under_way[request_id] = invocation
        headers = {
            "Lambda-Runtime-Aws-Request-Id": request_id,
            "Lambda-Runtime-Deadline-Ms": str(int(invocation.deadline * 1000)),
            "Lambda-Runtime-Invoked-Function-Arn": "arn:aws:lambda:eu-central-1:123456789012:function:pay",
            "Lambda-Runtime-Trace-Id": "Root=1-5759e988-bd862e3fe1be46a994272793;Sampled=0",
        }
        return 200, headers, json.dumps(invocation.event).encode()


@dataclass
class Environment:
    """An execution environment: a process, or several, that run Lambda's runtime client."""

    api: RuntimeApi
    process: asyncio.subprocess.Process
    output: Path

    async def invoke(self, event: Any, *, deadline_seconds: float = 900.0) -> Answer:
        """Send an event, and wait for the answer of the function; it must come, whatever the deadline is."""
        return await self.answer(self.send(event, deadline_seconds=deadline_seconds))

    def send(self, event: Any, *, deadline_seconds: float = 900.0) -> Invocation:
        return self.api.send(event, deadline_seconds=deadline_seconds)

    async def answer(self, invocation: Invocation) -> Answer:
        try:
            return await asyncio.wait_for(asyncio.shield(invocation.answer), PATIENCE_SECONDS)
        except TimeoutError:
            raise AssertionError(f"the function did not answer: {self.output.read_text()}") from None

    async def reaches(self, event: asyncio.Event) -> None:
        """Wait for something that the runtime client asks for."""
        try:
            await asyncio.wait_for(event.wait(), PATIENCE_SECONDS)
        except TimeoutError:
            raise AssertionError(f"the runtime did not get there: {self.output.read_text()}") from None

    def freeze(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    async def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()


@contextlib.asynccontextmanager
async def environment(
    handler: str, variables: Mapping[str, str], output: Path, *, runtime: str = "awslambdaric"
) -> AsyncGenerator[Environment]:
    """Run a handler of `tests.support.awslambda.app` until the end of the block."""
    api = RuntimeApi()
    server = await asyncio.start_server(api.serve, "127.0.0.1", 0)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "COVERAGE_"))}
    own = {"AWS_LAMBDA_RUNTIME_API": f"127.0.0.1:{server.sockets[0].getsockname()[1]}", "PYTHONUNBUFFERED": "1"}
    with output.open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", runtime, f"tests.support.awslambda.app.{handler}"),
            cwd=ROOT,
            env={**clean, **own, **variables},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    lambda_ = Environment(api, process, output)
    try:
        yield lambda_
    finally:
        await lambda_.kill()
        server.close()
        await api.aclose()
