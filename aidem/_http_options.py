"""The options of the HTTP layer: checked once, shared by all requests."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, TypeGuard

from aidem._http_fingerprint import parts
from aidem._http_types import header_values
from aidem._options import kind_of, refused
from aidem.config import IdempotencyConfig, check_call_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._http_types import Headers, Scope, ScopeFunction, StoreIf
    from aidem.persistence import PersistenceLayer

DAY_SECONDS: Final = 24 * 3600
MIB: Final = 1024 * 1024
METHODS: Final = frozenset({"POST", "PATCH"})
_UNTOUCHED_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "CONNECT"})

DEFAULT_CONFIG: Final = IdempotencyConfig(expires_after_seconds=DAY_SECONDS)
_WITHOUT_MEANING: Final = {
    "event_key_jmespath": "the key is in the Idempotency-Key header",
    "payload_validation_jmespath": "method, path, query, content type and body are always validated",
    "jmespath_options": "no expression is evaluated",
    "max_inflated_bytes": "no expression is evaluated",
    "raise_on_no_idempotency_key": "use required=True",
    "response_hook": "a replay is sent as it was recorded",
    "stored_exceptions": "responses are stored, not exceptions",
}
# 307 and 308 ask for the same request elsewhere, with the same key: it must not be taken by the one that was sent on.
_NOT_STORED: Final = frozenset({307, 308, 401, 403, 408, 422, 425, 429})


def store_by_default(status: int, headers: Headers) -> bool:
    """Whether a response is final, so that a retry would get the same: 2xx, and most of 3xx and 4xx."""
    is_final = 200 <= status < 500 and status not in _NOT_STORED  # noqa: PLR2004 - classes of status codes
    return is_final and not _are_events(headers)


def _are_events(headers: Headers) -> bool:
    """Whether the response is a stream of events, which may never end."""
    return any(
        name.lower() == b"content-type" and value.lower().startswith(b"text/event-stream") for name, value in headers
    )


def by_header(name: str) -> ScopeFunction:
    """Return a scope that tells callers apart by a header which proves who they are, such as `authorization`.

    The scope is a hash of the header, so that no credential is stored. A request without the header has no scope.
    """
    wanted = name.lower().encode("latin-1")

    def scope_of(scope: Scope) -> str | None:
        values = header_values(scope["headers"], wanted)
        return hashlib.sha256(parts(*values)).hexdigest() if any(values) else None

    return scope_of


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """What a middleware or a route class is told; see `aidem.asgi.IdempotencyMiddleware`.

    Raises:
        IdempotencyConfigError: An option has a value that cannot work; the message names it and what is allowed.
    """

    key_prefix: str
    scope: ScopeFunction | None
    persistence_store: PersistenceLayer | None = None
    config: IdempotencyConfig | None = None
    methods: Collection[str] = METHODS
    required: bool = False
    strict: bool = False
    max_request_bytes: int = 16 * MIB
    max_response_bytes: int = MIB
    store_if: StoreIf = store_by_default
    store_set_cookie: bool = False
    documentation_url: str | None = None

    def __post_init__(self) -> None:
        check_call_options(config=self.config, persistence_store=self.persistence_store, key_prefix=self.key_prefix)
        if not self.key_prefix:
            raise refused("key_prefix", repr(self.key_prefix), "a name of this service, so that no two services meet")
        for option, (is_allowed, allowed) in _CHECKS.items():
            value = getattr(self, option)
            if not is_allowed(value):
                raise refused(option, kind_of(value) if callable(value) else repr(value), allowed)
        _check_config(self.config or DEFAULT_CONFIG)
        object.__setattr__(self, "methods", frozenset(method.upper() for method in self.methods))

    @property
    def settings(self) -> IdempotencyConfig:
        """The config of every call."""
        return self.config or DEFAULT_CONFIG


def _check_config(config: IdempotencyConfig) -> None:
    defaults = {field.name: field.default for field in dataclasses.fields(IdempotencyConfig)}
    for setting, reason in _WITHOUT_MEANING.items():
        value = getattr(config, setting)
        if value != defaults[setting]:
            raise refused(setting, repr(value), f"left out here: {reason}")


def _are_methods(value: object) -> bool:
    if not _is_collection(value) or not value or not all(isinstance(name, str) for name in value):
        return False
    return not _UNTOUCHED_METHODS & {name.upper() for name in value}


def _is_collection(value: object) -> TypeGuard[Collection[Any]]:
    return isinstance(value, Collection) and not isinstance(value, str)


def _is_sync(value: Any) -> bool:
    is_async = inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(getattr(value, "__call__", None))  # noqa: B004
    return callable(value) and not is_async


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_CHECKS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "scope": (
        lambda value: value is None or (callable(value) and value is not by_header),
        'a callable scope(request_scope), such as by_header("authorization"), or None',
    ),
    "methods": (_are_methods, "a collection of methods that change something, such as ('POST', 'PATCH')"),
    "required": (_is_bool, "True or False"),
    "strict": (_is_bool, "True or False"),
    "max_request_bytes": (_is_size, "a whole number that is not negative"),
    "max_response_bytes": (_is_size, "a whole number that is not negative"),
    "store_if": (_is_sync, "a callable store_if(status, headers) that is not async"),
    "store_set_cookie": (_is_bool, "True or False"),
    "documentation_url": (lambda value: value is None or isinstance(value, str), "a URL as a string, or None"),
}
