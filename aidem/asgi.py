"""ASGI middleware that runs requests with an `Idempotency-Key` once. It imports no framework."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidem._http.gate import Gate
from aidem._http.lifespan import Lifespan
from aidem._http.options import HttpOptions, IdempotencyOptions, by_header
from aidem._http.types import Problem, RequestParts

if TYPE_CHECKING:
    from typing import Unpack

    from aidem._http.types import ASGIApp, Receive, Scope, Send

__all__ = ["IdempotencyMiddleware", "IdempotencyOptions", "Problem", "RequestParts", "by_header"]


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
