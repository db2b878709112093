"""ASGI middleware that runs requests with an `Idempotency-Key` once. It imports no framework."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidem._checks import refused
from aidem._http.answers import RefusedError
from aidem._http.gate import Gate
from aidem._http.lifespan import Lifespan
from aidem._http.options import DEFAULT_CONFIG, HttpOptions, IdempotencyOptions, by_header
from aidem._http.request import lookup_key, parse_key
from aidem._http.response import StoredResponse
from aidem._http.types import Problem, RequestParts
from aidem.config import check_call_options
from aidem.exceptions import IdempotencyKeyError

if TYPE_CHECKING:
    from typing import Unpack

    from aidem._http.types import ASGIApp, Receive, Scope, Send
    from aidem.config import IdempotencyConfig

__all__ = [
    "IdempotencyMiddleware",
    "IdempotencyOptions",
    "Problem",
    "RequestParts",
    "StoredResponse",
    "by_header",
    "request_key",
]


class IdempotencyMiddleware:
    """ASGI middleware for a whole app or a single Starlette route: `Route(..., middleware=[Middleware(...)])`.

    The first request with an `Idempotency-Key` runs, and its response is recorded. Later requests with the same key get
    that response, marked with `Idempotent-Replayed: true`. Requests without a key go to the app unchanged.

    Put it inside authentication, compression and CORS: a replay skips everything inside the middleware. Around a whole
    app it opens and closes its `persistence_store` with the app's lifespan.
    """

    def __init__(self, app: ASGIApp, **options: Unpack[IdempotencyOptions]) -> None:
        """Wrap an app.

        Args:
            app: The app.
            **options: `key_prefix` and `scope` are required; `IdempotencyOptions` lists all options and their defaults.

        Raises:
            IdempotencyConfigError: An option has a value that cannot work.
        """
        self.app = app
        self._gate = Gate(HttpOptions(**options))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or the lifespan of the app."""
        if scope["type"] == "lifespan":
            layer = self._gate.options.persistence_store
            if layer is not None:  # else it is that of `configure`, whose caller opens and closes it
                await Lifespan(layer, receive, send).run(self.app, scope)
                return
        await self._gate.serve(self.app, scope, receive, send)


def request_key(
    header: str, *, key_prefix: str, scope: str | None = None, config: IdempotencyConfig | None = None
) -> str:
    """Return the idempotency key of requests with a header, as operators need it to look at the record.

    Args:
        header: The value of the `Idempotency-Key` header, quoted or not.
        key_prefix: That of the middleware or route.
        scope: What its `scope` function returns for the caller. Default: keys are everybody's, as with `scope=None`.
        config: That of the middleware or route.

    Raises:
        IdempotencyKeyError: The header cannot name a key.
        IdempotencyConfigError: An option has a value that cannot work.
    """
    check_call_options(config=config, key_prefix=key_prefix)
    if scope is not None and not isinstance(scope, str):  # pyright: ignore[reportUnnecessaryIsInstance] - the function, by mistake
        raise refused("scope", repr(scope), "what the scope function returns for the caller, a string, or None")
    try:
        key = parse_key([header.encode()], strict=False)
    except RefusedError as error:
        raise IdempotencyKeyError(f"this header names no idempotency key: {error}") from error
    return lookup_key(key_prefix, space=scope, key=key, hash_function=(config or DEFAULT_CONFIG).hash_function)
