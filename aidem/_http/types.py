"""The shapes of ASGI as the HTTP layer speaks it, and what its options are called with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """An answer that is sent in place of the app's response. A `problem_body` function writes its body.

    Attributes:
        name: Identifies the kind of problem, such as `in-progress`.
        status: The status code.
        title: The kind of problem in a few words.
        detail: What the client can do. For an `HTTPException` raised by a scope function: its detail, unchanged.
        type: A URI for the kind of problem: the name below `documentation_url`, or `about:blank` without one.
        retry_after_seconds: The value of the `Retry-After` header, where the same request may succeed later. None: it
            would get the same answer, and there is no such header.
    """

    name: str
    status: int
    title: str
    detail: Any
    type: str = "about:blank"
    retry_after_seconds: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestParts:
    """A request with a key, as a `fingerprint` function gets it.

    Attributes:
        method: The method, such as `POST`.
        path: The decoded path as the client sees it, with the prefixes of mounted apps.
        query: The raw query string, without `?`.
        headers: All headers in order, with names in lower case.
        content_type: The value of the `Content-Type` header; `""` without one.
        body: The whole body.
    """

    method: str
    path: str
    query: bytes
    headers: tuple[tuple[bytes, bytes], ...]
    content_type: str
    body: bytes


ScopeFunction: TypeAlias = Callable[[Scope], "str | Awaitable[str | None] | None"]
StoreIf: TypeAlias = Callable[[int, Headers], bool]
ProblemBody: TypeAlias = Callable[[Problem, Scope], tuple[bytes, str]]
FingerprintFunction: TypeAlias = Callable[[RequestParts], bytes | None]
