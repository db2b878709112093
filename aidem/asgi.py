"""HTTP: requests that carry an `Idempotency-Key` run once; for any ASGI app, without importing a framework."""

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
    """ASGI middleware around a whole app, or a single Starlette route: `Route(..., middleware=[Middleware(...)])`.

    Put it inside authentication, compression and CORS: a replay skips everything that is further in.
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
