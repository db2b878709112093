"""A client and a server in one: speaks ASGI to an app as uvicorn does, and sees every message."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from aidem import IdempotencyConfig
from aidem.asgi import IdempotencyMiddleware
from tests.support.planned import Listener, PlannedLayer

KEY = b'"8e03978e-40d5-43dd-bc93-6894a57f9324"'
JSON = (b"content-type", b"application/json")


@dataclass
class Response:
    """What the client got."""

    messages: list[dict[str, Any]]

    @property
    def start(self) -> dict[str, Any]:
        return next(message for message in self.messages if message["type"] == "http.response.start")

    @property
    def status(self) -> int:
        status: int = self.start["status"]
        return status

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return [(name, value) for name, value in self.start["headers"]]

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def is_complete(self) -> bool:
        bodies = [message for message in self.messages if message["type"] == "http.response.body"]
        return bool(bodies) and not bodies[-1].get("more_body", False)

    @property
    def is_replay(self) -> bool:
        return (b"idempotent-replayed", b"true") in self.headers

    @property
    def problem(self) -> dict[str, Any]:
        assert self.header(b"content-type") == b"application/problem+json"
        problem: dict[str, Any] = json.loads(self.body)
        assert problem["status"] == self.status
        return problem

    def header(self, name: bytes) -> bytes | None:
        values = [value for found, value in self.headers if found == name]
        assert len(values) <= 1
        return values[0] if values else None


@dataclass
class Connection:
    """One request: `receive` and `send` of an ASGI server, and what came of them.

    Like uvicorn, it reports a disconnect when the client has gone and when the response is complete, and lets what is
    sent to a client that has gone fall on the floor.
    """

    chunks: list[bytes]
    messages: list[dict[str, Any]] = field(default_factory=list)
    on_send: Callable[[dict[str, Any]], Any] | None = None
    received: int = 0
    is_gone: bool = False
    _over: asyncio.Event = field(default_factory=asyncio.Event)

    async def receive(self) -> dict[str, Any]:
        self.received += 1
        if self.chunks:
            return {"type": "http.request", "body": self.chunks.pop(0), "more_body": bool(self.chunks)}
        await self._over.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if self.on_send is not None:
            await self.on_send(message)
        if self.is_gone:
            return
        self.messages.append(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self._over.set()

    def disconnect(self) -> None:
        self.is_gone = True
        self._over.set()

    @property
    def response(self) -> Response:
        return Response(self.messages)


def scope_of(
    method: str = "POST",
    path: str = "/payments",
    *,
    key: bytes | None = KEY,
    headers: Sequence[tuple[bytes, bytes]] = (JSON,),
    query: bytes = b"",
    **more: Any,
) -> dict[str, Any]:
    keyed = [] if key is None else [(b"idempotency-key", key)]
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "scheme": "https",
        "path": path,
        "raw_path": path.encode(),
        "query_string": query,
        "root_path": "",
        "headers": [*headers, *keyed],
        "client": ("192.0.2.1", 1234),
        "server": ("192.0.2.2", 443),
    } | more


async def request(
    app: Any, method: str = "POST", path: str = "/payments", *, body: bytes | list[bytes] = b"{}", **scope: Any
) -> Response:
    """Send a request and return what came back."""
    connection = Connection([body] if isinstance(body, bytes) else body)
    await app(scope_of(method, path, **scope), connection.receive, connection.send)
    return connection.response


@dataclass
class Shop:
    """An app that counts how often it ran; what it answers can be set.

    Attributes:
        status: Of its response.
        headers: Of its response; where none declares a length, the response is a stream.
        body: The messages of its response.
        error: What it raises instead of its response.
        seconds: How long it takes.
        background: What it does after its response.
    """

    status: int = 201
    headers: list[tuple[bytes, bytes]] = field(default_factory=lambda: [JSON, (b"content-length", b"12")])
    body: Iterable[bytes] = (b'{"paid": 42}',)
    error: BaseException | None = None
    seconds: float = 0.0
    background: Callable[[], Any] | None = None
    scopes: list[Any] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    receive: Any = None
    send: Any = None

    @property
    def runs(self) -> int:
        return len(self.scopes)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        self.receive, self.send = receive, send
        self.bodies.append(await body_of(receive))
        if self.seconds:
            await asyncio.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        chunks = list(self.body)
        for number, chunk in enumerate(chunks, 1):
            await send({"type": "http.response.body", "body": chunk, "more_body": number < len(chunks)})
        if self.background is not None:
            await self.background()


async def body_of(receive: Any) -> bytes:
    body, more_body = b"", True
    while more_body:
        message = await receive()
        assert message["type"] == "http.request"
        body += message.get("body", b"")
        more_body = message.get("more_body", False)
    return body


@dataclass
class Front:
    """The middleware around an app, with its layer and what hooks were told."""

    app: Any
    layer: PlannedLayer
    listener: Listener
    middleware: IdempotencyMiddleware

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.middleware(scope, receive, send)


def front_of(
    app: Any, *, layer: PlannedLayer | None = None, settings: dict[str, Any] | None = None, **options: Any
) -> Front:
    layer, listener = layer or PlannedLayer(), Listener()
    config = IdempotencyConfig(**{"hooks": (listener,)} | (settings or {}))
    given: dict[str, Any] = {
        "persistence_store": layer,
        "config": config,
        "key_prefix": "shop",
        "scope": None,
    } | options
    return Front(app, layer, listener, IdempotencyMiddleware(app, **given))
