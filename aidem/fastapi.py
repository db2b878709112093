"""FastAPI route class that runs requests with an `Idempotency-Key` once, and describes this in the OpenAPI document."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self, cast

from aidem._distribution import how_to_install

try:
    from fastapi.dependencies.utils import get_flat_params
    from fastapi.openapi.utils import validation_error_definition
    from fastapi.routing import APIRoute
    from fastapi.utils import create_model_field
    from pydantic import BaseModel, ConfigDict
except ImportError as error:
    raise ImportError(f"aidem.fastapi needs FastAPI: {how_to_install('fastapi')}") from error

from aidem._http import openapi
from aidem._http.answers import MEDIA_TYPE
from aidem._http.gate import Gate
from aidem._http.options import HttpOptions, IdempotencyOptions, by_header
from aidem._http.types import Problem, RequestParts
from aidem.exceptions import IdempotencyConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Unpack

    from fastapi.dependencies.models import Dependant
    from pydantic.fields import FieldInfo

    from aidem._http.types import Receive, Scope, Send

__all__ = ["IdempotencyOptions", "IdempotentRoute", "Problem", "RequestParts", "by_header"]


class IdempotentRoute(APIRoute):
    """A route that runs requests with an `Idempotency-Key` once, and answers a retry with the recorded response.

    `configure` returns the class to use: `APIRouter(route_class=IdempotentRoute.configure(...))`.
    """

    _gate: ClassVar[Gate | None] = None

    @classmethod
    def configure(cls, **options: Unpack[IdempotencyOptions]) -> type[Self]:
        """Return a new route class with these options. The class it is called on does not change.

        `scope` is called before any dependency of the route. The first use opens the layer; close it in the lifespan of
        the app.

        Args:
            **options: `key_prefix` and `scope` are required; `IdempotencyOptions` lists all options and their defaults.

        Raises:
            IdempotencyConfigError: An option has a value that cannot work.
        """
        gate = Gate(HttpOptions(**options))
        namespace = {"_gate": gate, "__module__": cls.__module__, "__doc__": cls.__doc__}
        return cast("type[Self]", type(cls.__name__, (cls,), namespace))

    def __init__(self, path: str, endpoint: Callable[..., Any], **options: Any) -> None:
        """Make a route, as FastAPI's routers do.

        Raises:
            IdempotencyConfigError: The class was not configured.
        """
        if self._gate is None:
            raise IdempotencyConfigError("use route_class=IdempotentRoute.configure(...), not IdempotentRoute itself")
        self._once = self._gate
        super().__init__(path, endpoint, **options)
        of_interest = self._gate.options.methods
        self._once_methods = frozenset(method for method in self.methods or () if method in of_interest)
        if self._once_methods:
            _document(self, self._gate.options)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request. The final response passes through here, error responses included."""
        if scope["method"] in self._once_methods:
            await self._once.serve(super().handle, scope, receive, send)
        else:
            await super().handle(scope, receive, send)


# --- The OpenAPI document ---------------------------------------------------------------------------------------------


class IdempotencyKeyProblem(BaseModel):
    """A problem (RFC 9457), sent in place of the operation's own response."""

    type: str
    title: str
    status: int
    detail: str


def _as_in_fastapi(schema: dict[str, Any]) -> None:
    schema.clear()
    schema.update(validation_error_definition)


class ValidationError(BaseModel):
    """What FastAPI says about one value: its schema is FastAPI's, so that both are one component."""

    model_config = ConfigDict(json_schema_extra=_as_in_fastapi)


def _without_required(schema: dict[str, Any]) -> None:
    del schema["required"], schema["description"]


class HTTPValidationError(BaseModel):
    """The body of FastAPI's 422: its schema is FastAPI's, so that both are one component."""

    model_config = ConfigDict(json_schema_extra=_without_required)

    detail: list[ValidationError]


_UNPROCESSABLE: Final[Any] = IdempotencyKeyProblem | HTTPValidationError
_PROBLEM: Final = {"$ref": f"#/components/schemas/{IdempotencyKeyProblem.__name__}"}


class _Content(dict[str, Any]):
    """The content of a response whose model has a media type of its own; FastAPI would write it under the route's."""

    def __init__(self, media_type: str, declared: dict[str, Any]) -> None:
        super().__init__(declared)
        self._media_type = media_type

    def setdefault(self, key: str, default: Any = None, /) -> Any:  # noqa: ARG002 - the media type of the route
        """Return where FastAPI is to write the model: each time a new place, or older versions would write it twice."""
        self[self._media_type] = default
        return default


def _document(route: APIRoute, options: HttpOptions) -> None:
    """Put what the layer adds into the document; routers that are included copy a route, and it comes here again."""
    validates = bool(get_flat_params(route.dependant) or route.body_field)
    models = (_UNPROCESSABLE, IdempotencyKeyProblem)  # which nobody else declares
    declared = {str(status) for status, each in route.responses.items() if each.get("model") not in models}
    if options.problem_body is None:  # else only the service knows what its problems are like
        _share_problem(route, declared, options, validates=validates)
    own: dict[str, Any] = route.openapi_extra or {}
    responses = openapi.responses(
        options,
        own={*_success_status(route), *filter(str.isdigit, declared)},
        described={str(status) for status in route.responses},
        specified={str(status) for status, each in route.responses.items() if MEDIA_TYPE in each.get("content", ())},
        validates=validates,
        schema=_PROBLEM,
    )
    extra = _merged({"responses": responses}, own)
    parameters: list[dict[str, Any]] = own.get("parameters", [])
    headers = {each["name"] for each in parameters if each.get("in") == "header"} | {*_header_names(route.dependant)}
    if options.header_name.lower() not in map(str.lower, headers):
        required = options.required and all(method in options.methods for method in route.methods or ())
        extra["parameters"] = [openapi.key_parameter(options, required=required), *parameters]
    route.openapi_extra = extra


def _share_problem(route: APIRoute, declared: set[str], options: HttpOptions, *, validates: bool) -> None:
    """Make the problem a component, and a part of every model of a status that the layer answers as well.

    Many generated clients read one media type of a status, and must understand both bodies there.
    """
    found = dict(route.responses)
    for status, each in route.responses.items():
        if str(status) in declared & openapi.STATUSES and each.get("model") is not None:
            found[status] = each | {"model": each["model"] | IdempotencyKeyProblem}
    status = "422" if "422" in found else 422
    if found.get(status, {}).get("model") is None:
        is_ours = validates and not {"422", "4XX", "DEFAULT"} & {each.upper() for each in declared}
        media_type, model = ("application/json", _UNPROCESSABLE) if is_ours else (MEDIA_TYPE, IdempotencyKeyProblem)
        response: dict[str, Any] = {"description": openapi.description(options, 422, validates=validates)}
        response |= found.get(status, {})
        found[status] = response | {"model": model, "content": _Content(media_type, response.get("content", {}))}
    route.responses = found
    route.response_fields = {
        status: create_model_field(f"Response_{status}_{route.unique_id}", each["model"], mode="serialization")
        for status, each in found.items()
        if each.get("model") is not None
    }


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
