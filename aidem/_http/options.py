"""The options of the HTTP layer: checked once, shared by all requests."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Required, TypedDict, TypeGuard

from aidem._checks import kind_of, refused
from aidem._http.request import parts
from aidem._http.response import ResponseCheck, store_by_default
from aidem.config import IdempotencyConfig, check_call_options

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem._http.types import FingerprintFunction, ProblemBody, Scope, ScopeFunction, StoreIf
    from aidem.persistence import PersistenceLayer

DAY_SECONDS: Final = 24 * 3600
MIB: Final = 1024 * 1024
METHODS: Final = frozenset({"POST", "PATCH"})
_UNTOUCHED_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "CONNECT"})

DEFAULT_CONFIG: Final = IdempotencyConfig(expires_after_seconds=DAY_SECONDS)
_WITHOUT_MEANING: Final = {
    "event_key_jmespath": "the key is in a header of the request",
    "payload_validation_jmespath": "method, path, query, content type and body are always validated",
    "jmespath_options": "no expression is evaluated",
    "max_inflated_bytes": "no expression is evaluated",
    "raise_on_no_idempotency_key": "use required=True",
    "response_hook": "a replay is sent as it was recorded",
    "stored_exceptions": "responses are stored, not exceptions",
}
_TOKEN: Final = re.compile(r"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")  # RFC 9110, section 5.6.2


def by_header(name: str, *more: str) -> ScopeFunction:
    """Return a scope function that identifies callers by the headers that prove who they are, such as `authorization`.

    It returns a hash of the values of all headers, so that no credential is stored, and None for a request that lacks
    one of them. A client that renews its token between two attempts counts as another caller, and its request runs
    again. For tokens that are renewed, write a scope function that verifies the token and returns its subject.

    Args:
        name: The name of a header.
        *more: Names of further headers, such as `x-tenant`.

    Raises:
        IdempotencyConfigError: A name cannot be the name of a header.
    """
    for option in (name, *more):
        if not _is_header_name(option):
            raise refused("by_header name", repr(option), _HEADER_NAME)
    wanted = [each.lower().encode("ascii") for each in (name, *more)]

    def scope_of(scope: Scope) -> str | None:
        lines = scope["headers"]
        found = [[value for name, value in lines if name == each] for each in wanted]
        if not all(map(any, found)):
            return None
        # One header's values are hashed as they always were, so that its records are still found.
        text = parts(*(parts(*values) for values in found)) if more else parts(*found[0])
        return hashlib.sha256(text).hexdigest()

    return scope_of


class IdempotencyOptions(TypedDict, total=False):
    """The options of `IdempotencyMiddleware` and `IdempotentRoute.configure`.

    Attributes:
        key_prefix: Required. The name of the service; services that share a store must have different names.
        scope: Required. A function `scope(request_scope)`, sync or async, that returns the verified caller as a string,
            such as `by_header("authorization")`, or None if there is none; see `required`. With `scope=None` instead of
            a function, all callers share one space of keys.
        persistence_store: The persistence layer. Default: that of `aidem.configure`.
        config: Settings. Default: responses are kept for 24 hours.
        methods: The HTTP methods whose requests may carry a key. Default: POST and PATCH.
        required: Whether requests of these methods are refused with 400 if they have no key or no verified caller.
            Default: False; such requests run without idempotency.
        strict: Whether keys must be quoted strings. Default: False; bare values are accepted, too.
        header_name: The request header that holds the key. Default: `Idempotency-Key`.
        replayed_header: The response header that marks a replay with `true`. Default: `Idempotent-Replayed`.
        max_request_bytes: The largest body of a request with a key; it is read into memory. Default: 16 MiB.
        max_response_bytes: The largest response body that is kept for a replay. Default: 1 MiB.
        fingerprint: A function `fingerprint(request)` that gets `RequestParts` and returns the bytes to compare
            instead of query, content type and body, for clients that serialise a retry differently. Method and path
            are always compared. If it returns None, the default applies to this request. Default: query, content type
            and body are compared byte for byte.
        store_if: A function `store_if(status, headers)` that returns whether a response is final and stored; for other
            responses the key is released. Default: 2xx, 3xx and 4xx, except 307, 308, 401, 403, 408, 421, 422, 423,
            425, 426, 428 and 429, responses with `Retry-After`, streams of events, and the 404 and 405 of requests for
            which there is no route.
        store_set_cookie: Whether `Set-Cookie` is stored and replayed. Default: False.
        problem_body: A function `problem_body(problem, request_scope)` that gets a `Problem` and returns the body, as
            bytes, and the content type of an answer that is sent in place of the app's. Default: None;
            `application/problem+json`.
        documentation_url: The page that the `type` of a problem points to. Default: None; the type is `about:blank`.
    """

    key_prefix: Required[str]
    scope: Required[ScopeFunction | None]
    persistence_store: PersistenceLayer | None
    config: IdempotencyConfig | None
    methods: Collection[str]
    required: bool
    strict: bool
    header_name: str
    replayed_header: str
    max_request_bytes: int
    max_response_bytes: int
    fingerprint: FingerprintFunction | None
    store_if: StoreIf
    store_set_cookie: bool
    problem_body: ProblemBody | None
    documentation_url: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpOptions:
    """The options of a middleware or a route class, checked and with their defaults; see `IdempotencyOptions`.

    Attributes:
        settings: The config of every call, in which a check of the user's is a `ResponseCheck`.
        key_header: The name of the header that holds the key, as ASGI writes it.
        replay_mark: The name of the header that marks a replay.

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
    header_name: str = "Idempotency-Key"
    replayed_header: str = "Idempotent-Replayed"
    max_request_bytes: int = 16 * MIB
    max_response_bytes: int = MIB
    fingerprint: FingerprintFunction | None = None
    store_if: StoreIf = store_by_default
    store_set_cookie: bool = False
    problem_body: ProblemBody | None = None
    documentation_url: str | None = None

    settings: IdempotencyConfig = field(init=False, repr=False, compare=False)
    key_header: bytes = field(init=False, repr=False, compare=False)
    replay_mark: bytes = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_call_options(config=self.config, persistence_store=self.persistence_store, key_prefix=self.key_prefix)
        if not self.key_prefix:
            allowed = "the name of this service, different from that of every other service that uses the store"
            raise refused("key_prefix", repr(self.key_prefix), allowed)
        for option, (is_allowed, allowed) in _CHECKS.items():
            value = getattr(self, option)
            if not is_allowed(value):
                raise refused(option, kind_of(value) if callable(value) else repr(value), allowed)
        derived = {
            "methods": frozenset(method.upper() for method in self.methods),
            "settings": self._settings(self.config or DEFAULT_CONFIG),
            "key_header": self.header_name.lower().encode("ascii"),
            "replay_mark": self.replayed_header.lower().encode("ascii"),
        }
        for option, value in derived.items():
            object.__setattr__(self, option, value)

    def _settings(self, config: IdempotencyConfig) -> IdempotencyConfig:
        defaults = {field.name: field.default for field in dataclasses.fields(IdempotencyConfig)}
        for setting, reason in _WITHOUT_MEANING.items():
            value = getattr(config, setting)
            if value != defaults[setting]:
                raise refused(setting, repr(value), f"left out here: {reason}")
        if not callable(config.on_abandoned):
            return config
        check = ResponseCheck(config.on_abandoned, store_set_cookie=self.store_set_cookie)
        return dataclasses.replace(config, on_abandoned=check)


def _are_methods(value: object) -> bool:
    if not _is_collection(value) or not value or not all(isinstance(name, str) for name in value):
        return False
    return not _UNTOUCHED_METHODS & {name.upper() for name in value}


def _is_collection(value: object) -> TypeGuard[Collection[Any]]:
    return isinstance(value, Collection) and not isinstance(value, str)


def _is_sync(value: Any) -> bool:
    is_async = inspect.iscoroutinefunction(value) or inspect.iscoroutinefunction(getattr(value, "__call__", None))  # noqa: B004
    return callable(value) and not is_async


def _is_sync_or_none(value: Any) -> bool:
    return value is None or _is_sync(value)


def _is_header_name(value: Any) -> bool:
    return isinstance(value, str) and _TOKEN.fullmatch(value) is not None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_HEADER_NAME: Final = "the name of a header, as a string such as 'X-Idempotency-Key'"
_CHECKS: Final[dict[str, tuple[Callable[[Any], bool], str]]] = {
    "scope": (
        lambda value: value is None or (callable(value) and value is not by_header),
        'a callable scope(request_scope), such as by_header("authorization"), or None',
    ),
    "methods": (_are_methods, "a collection of methods that change something, such as ('POST', 'PATCH')"),
    "required": (_is_bool, "True or False"),
    "strict": (_is_bool, "True or False"),
    "header_name": (_is_header_name, _HEADER_NAME),
    "replayed_header": (_is_header_name, _HEADER_NAME),
    "max_request_bytes": (_is_size, "a whole number that is not negative"),
    "max_response_bytes": (_is_size, "a whole number that is not negative"),
    "fingerprint": (_is_sync_or_none, "a callable fingerprint(request) that is not async, or None"),
    "store_if": (_is_sync, "a callable store_if(status, headers) that is not async"),
    "store_set_cookie": (_is_bool, "True or False"),
    "problem_body": (_is_sync_or_none, "a callable problem_body(problem, request_scope) that is not async, or None"),
    "documentation_url": (lambda value: value is None or isinstance(value, str), "a URL as a string, or None"),
}
