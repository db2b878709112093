"""The shapes of ASGI, and the functions that options take."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from aidem._http.answers import Problem
    from aidem._http.request import RequestParts

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = list[tuple[bytes, bytes]]

ScopeFunction: TypeAlias = Callable[[Scope], "str | Awaitable[str | None] | None"]
StoreIf: TypeAlias = Callable[[int, Headers], bool]
ProblemBody: TypeAlias = "Callable[[Problem, Scope], tuple[bytes, str]]"
FingerprintFunction: TypeAlias = "Callable[[RequestParts], bytes | None]"
