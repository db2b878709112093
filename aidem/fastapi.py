"""FastAPI: a class of routes that run once per `Idempotency-Key`, and say so in the OpenAPI document."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Self, cast

from aidem._distribution import how_to_install

try:
    from fastapi.dependencies.utils import get_flat_params
    from fastapi.routing import APIRoute
except ImportError as error:
    raise ImportError(f"aidem.fastapi needs FastAPI: {how_to_install('fastapi')}") from error

from aidem import _http_openapi as openapi
from aidem._http_gate import Gate
from aidem._http_options import METHODS, MIB, HttpOptions, by_header, store_by_default
from aidem.exceptions import IdempotencyConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from fastapi.dependencies.models import Dependant
    from pydantic.fields import FieldInfo

    from aidem._http_types import Receive, Scope, ScopeFunction, Send, StoreIf
    from aidem.config import IdempotencyConfig
    from aidem.persistence import PersistenceLayer

__all__ = ["IdempotentRoute", "by_header"]


class IdempotentRoute(APIRoute):
    """A route whose requests with an `Idempotency-Key` run once.

    `configure` returns the class to use: `APIRouter(route_class=IdempotentRoute.configure(...))`.
    """

    _gate: ClassVar[Gate | None] = None

    @classmethod
    def configure(
        cls,
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
    ) -> type[Self]:
        """Return a new class of routes; this one stays as it is.

        The options are those of `aidem.asgi.IdempotencyMiddleware`. `scope` is asked before any dependency of the route
        has run. Nothing opens or closes the layer but its first use: do it in the lifespan of the app.

        Raises:
            IdempotencyConfigError: An option has a value that cannot work.
        """
        options = HttpOptions(
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
        namespace = {"_gate": Gate(options), "__module__": cls.__module__, "__doc__": cls.__doc__}
        return cast("type[Self]", type(cls.__name__, (cls,), namespace))

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        """Make a route, as FastAPI's routers do.

        Raises:
            IdempotencyConfigError: The class was not configured.
        """
        if self._gate is None:
            raise IdempotencyConfigError("route_class must be what IdempotentRoute.configure(...) returns")
        super().__init__(path, endpoint, **options)
        self._once = self._gate
        of_interest = self._gate.options.methods
        self._once_methods = frozenset(method for method in self.methods or () if method in of_interest)
        if self._once_methods:
            self.openapi_extra = _documented(self, self._gate.options)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; here the final response passes, those of errors included."""
        if scope["method"] in self._once_methods:
            await self._once.serve(super().handle, scope, receive, send)
        else:
            await super().handle(scope, receive, send)


def _documented(route: APIRoute, options: HttpOptions) -> dict[str, Any]:
    """Return what goes into the document beside what FastAPI finds; routers that copy a route come here again."""
    own: dict[str, Any] = route.openapi_extra or {}
    declared = {str(status) for status in route.responses}
    responses = openapi.responses(
        options,
        own={*_success_status(route), *filter(str.isdigit, declared)},
        described=declared,
        validates=bool(get_flat_params(route.dependant) or route.body_field),
    )
    extra = _merged({"responses": responses}, own)
    parameters: list[dict[str, Any]] = own.get("parameters", [])
    headers = {each["name"] for each in parameters if each.get("in") == "header"} | {*_header_names(route.dependant)}
    if openapi.KEY_HEADER.lower() not in map(str.lower, headers):
        required = options.required and all(method in options.methods for method in route.methods or ())
        extra["parameters"] = [openapi.key_parameter(options, required=required), *parameters]
    return extra


def _merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Return what both say, however deep; where they differ, it is theirs."""
    both = ours | theirs
    for key in ours.keys() & theirs.keys():
        if isinstance(ours[key], dict) and isinstance(theirs[key], dict):
            both[key] = _merged(ours[key], theirs[key])
    return both


def _header_names(dependant: Dependant) -> Iterator[str]:
    """Yield the headers that a function and its dependencies take, one by one or as a model."""
    for field in dependant.header_params:
        yield field.alias
        model_fields: dict[str, FieldInfo] = getattr(field.field_info.annotation, "model_fields", {})
        for name, info in model_fields.items():
            yield info.alias or name.replace("_", "-")
    for dependency in dependant.dependencies:
        yield from _header_names(dependency)


def _success_status(route: APIRoute) -> Iterator[str]:
    """Yield the status of a success where FastAPI finds one: the signature of a response class may not say it."""
    if route.status_code is not None:
        yield str(route.status_code)
        return
    response_class: Any = getattr(route.response_class, "value", route.response_class)  # FastAPI's mark of a default
    parameter = inspect.signature(response_class.__init__).parameters.get("status_code")
    if parameter is not None and isinstance(parameter.default, int):
        yield str(parameter.default)
