"""A service for two uvicorn workers, whose every execution is in a log outside of them.

`uvicorn --workers 2 tests.support.service:app` with the settings in the environment variable SERVICE, as JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from aidem import AbandonedExecution, DidNotHappen, Happened, IdempotencyConfig, StillUnknown, Verdict
from aidem.asgi import IdempotencyMiddleware
from aidem.persistence import open_persistence_layer
from tests.support.processes.worker import Log
from tests.support.service_data import BINARY, DOCUMENT, Arrivals

SETTINGS: dict[str, Any] = json.loads(os.environ["SERVICE"])

log = Log(SETTINGS["log"])


async def effect(request: Request) -> dict[str, Any]:
    """Do what must not be done twice; it is in the log when it begins and when it ends."""
    name = request.headers["x-name"]
    seconds = float(request.headers.get("x-seconds") or request.query_params.get("seconds", "0"))
    facts = {"effect": os.urandom(8).hex()}
    log.write("start", name, **facts)
    await asyncio.sleep(seconds)
    log.write("end", name, **facts)
    return facts | {"name": name}


async def charge(request: Request) -> Response:
    await request.body()
    return JSONResponse(await effect(request), status_code=201)


async def empty(request: Request) -> Response:
    await effect(request)
    return Response(status_code=204)


async def binary(request: Request) -> Response:
    await effect(request)
    return Response(BINARY, media_type="application/octet-stream")


async def upload(request: Request) -> Response:
    body = await request.body()
    done = await effect(request)
    return JSONResponse(done | {"sha256": hashlib.sha256(body).hexdigest(), "bytes": len(body)})


async def cookies(request: Request) -> Response:
    response = JSONResponse(await effect(request))
    for name in ("a", "b", "c"):
        response.set_cookie(name, name * 3)
    response.headers.append("link", "<one>")
    response.headers.append("link", "<two>")
    return response


async def background(request: Request) -> Response:
    async def send_mail() -> None:
        log.write("mail", request.headers["x-name"])
        raise RuntimeError("no mail server")

    return JSONResponse(await effect(request), background=BackgroundTask(send_mail))


async def cancelled(request: Request) -> Response:
    await effect(request)
    log.write("cancelled", request.headers["x-name"])
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(0)
    raise AssertionError("it was cancelled")


async def stream(request: Request) -> Response:
    """Stream lines; the next one comes when the last is known to have arrived: a file says so."""
    done = await effect(request)
    chunks = int(request.query_params.get("chunks", "3"))

    async def events() -> AsyncIterator[bytes]:
        for number in range(chunks):
            yield f"data: {json.dumps(done | {'number': number})}\n\n".encode()
            await _arrived(request, number)
        log.write("streamed", done["name"])

    return StreamingResponse(events(), media_type="text/plain")


async def _arrived(request: Request, number: int) -> None:
    path = request.headers.get("x-arrivals")
    while path is not None and not Arrivals(path).has(number):  # noqa: ASYNC110 - it is another process that knows
        await asyncio.sleep(0.005)


async def document(request: Request) -> Response:
    await effect(request)
    path = Path(SETTINGS["log"]).with_name(request.headers["x-name"])
    path.write_bytes(DOCUMENT)
    return FileResponse(path, headers={"vary": "cookie"})


async def cut(request: Request) -> Response:
    done = await effect(request)

    async def broken() -> AsyncIterator[bytes]:
        yield json.dumps(done).encode()
        log.write("broken", done["name"])
        raise RuntimeError("broken")

    return StreamingResponse(broken())


async def large(request: Request) -> Response:
    done = await effect(request)
    return JSONResponse(done | {"padding": "x" * SETTINGS["max_response_bytes"]})


async def find_out(abandoned: AbandonedExecution) -> Verdict:
    """Answer what the header `x-verdict` says, once the other requests that are to wait for it have arrived."""
    request = Request(abandoned.payload)
    name = request.headers["x-name"]
    log.write("asked", name)
    await _arrived(request, 0)
    verdicts: dict[str, Verdict] = {
        "happened": Happened(JSONResponse({"effect": "found", "name": name}, status_code=201)),
        "did not happen": DidNotHappen(),
        "unknown": StillUnknown(),
    }
    return verdicts[request.headers["x-verdict"]]


class Named:
    """Says which worker answers, on replays too; it edits the headers that it gets, as many a middleware does."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def named(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"].append((b"x-pid", str(os.getpid()).encode()))
            await send(message)

        if scope["type"] == "http" and "x-verdict" in (headers := Request(scope).headers):
            log.write("arrived", headers["x-name"])
        await self.app(scope, receive, named if scope["type"] == "http" else send)


@contextlib.asynccontextmanager
async def lifespan(_app: Starlette) -> AsyncIterator[None]:
    log.write("ready", "")
    yield
    log.write("left", "")


ROUTES = (charge, empty, binary, upload, cookies, background, cancelled, stream, document, cut, large)
inner = Starlette(routes=[Route(f"/{route.__name__}", route, methods=["POST"]) for route in ROUTES], lifespan=lifespan)
named = Named(
    IdempotencyMiddleware(
        inner,
        persistence_store=open_persistence_layer(SETTINGS["store"]),
        config=IdempotencyConfig(
            lease_seconds=SETTINGS["lease_seconds"],
            wait_timeout_seconds=SETTINGS["wait_timeout_seconds"],
            on_abandoned=find_out if SETTINGS["has_check"] else "run_again",
        ),
        key_prefix="service",
        scope=lambda scope: next(
            (value.decode() for name, value in scope["headers"] if name == b"authorization"), "anybody"
        ),
        max_response_bytes=SETTINGS["max_response_bytes"],
    )
)
compressed = GZipMiddleware(named)


async def app(scope: Any, receive: Any, send: Any) -> None:
    await (compressed if scope.get("path") == "/document" else named)(scope, receive, send)
