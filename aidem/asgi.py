"""HTTP: requests that carry an `Idempotency-Key` run once; for any ASGI app, without importing a framework."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aidem._http_gate import Gate
from aidem._http_lifespan import Lifespan
from aidem._http_options import METHODS, MIB, HttpOptions, by_header, store_by_default

if TYPE_CHECKING:
    from collections.abc import Collection

    from aidem._http_types import ASGIApp, Receive, Scope, ScopeFunction, Send, StoreIf
    from aidem.config import IdempotencyConfig
    from aidem.persistence import PersistenceLayer

__all__ = ["IdempotencyMiddleware", "by_header"]


class IdempotencyMiddleware:
    """ASGI middleware around a whole app, or a single Starlette route: `Route(..., middleware=[Middleware(...)])`.

    Put it inside authentication, compression and CORS: a replay skips everything that is further in.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        key_prefix: str,
        scope: ScopeFunction | None,
        persistence_store: PersistenceLayer | None = None,
        config: IdempotencyConfig | None = None,
        methods: Collection[str] = METHODS,
        required: bool = False,
        strict: bool = False,
        max_request_bytes: int = 16 * MIB,
        max_response_bytes: int = MIB,
        store_if: StoreIf = store_by_default,
        store_set_cookie: bool = False,
        documentation_url: str | None = None,
    ) -> None:
        """Wrap an app.

        Args:
            app: The app.
            key_prefix: Names the service: two services with one store must not meet.
            scope: `scope(request_scope)`, sync or async, says whose key it is, by something that was verified; None or
                `""` from it: the request passes without idempotency. `by_header("authorization")` is such a function.
                `scope=None` instead: all callers share one space of keys.
            persistence_store: Where records are kept; by default what `aidem.configure` says.
            config: Settings; by default responses are kept for 24 hours.
            methods: Which requests may carry a key.
            required: Whether those without a key are refused.
            strict: Whether a key that is not a quoted string is refused.
            max_request_bytes: The largest body of a request with a key; it is read into memory.
            max_response_bytes: The largest body that is kept for a replay.
            store_if: `store_if(status, headers)` says whether a response is final; by default 2xx, 3xx and 4xx except
                307, 308, 401, 403, 408, 422, 425 and 429, streams of events, and the 404 and 405 of what no route has.
                If not, the key is given back.
            store_set_cookie: Whether cookies are replayed.
            documentation_url: The page that the `type` of an error points at.

        Raises:
            IdempotencyConfigError: An option has a value that cannot work.
        """
        self.app = app
        self._gate = Gate(
            HttpOptions(
                key_prefix=key_prefix,
                scope=scope,
                persistence_store=persistence_store,
                config=config,
                methods=methods,
                required=required,
                strict=strict,
                max_request_bytes=max_request_bytes,
                max_response_bytes=max_response_bytes,
                store_if=store_if,
                store_set_cookie=store_set_cookie,
                documentation_url=documentation_url,
            )
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request, or the lifespan of the app."""
        layer = self._gate.options.persistence_store
        if scope["type"] == "lifespan" and layer is not None:  # that of `configure` belongs to whoever called it
            await Lifespan(layer, receive, send).run(self.app, scope)
        else:
            await self._gate.serve(self.app, scope, receive, send)
