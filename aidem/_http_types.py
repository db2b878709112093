"""The shapes of ASGI, as the HTTP layer speaks it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, TypeAlias

Scope: TypeAlias = MutableMapping[str, Any]
Message: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Message]]
Send: TypeAlias = Callable[[Message], Awaitable[None]]
ASGIApp: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

LONGEST_LENGTH: Final = 18
"""How many digits a length may have."""

Headers: TypeAlias = list[tuple[bytes, bytes]]
ScopeFunction: TypeAlias = Callable[[Scope], "str | Awaitable[str | None] | None"]
StoreIf: TypeAlias = Callable[[int, Headers], bool]


def header_values(headers: Any, name: bytes) -> list[bytes]:
    """Return all values of a header; ASGI writes names in lower case."""
    return [value for found, value in headers if found == name]


def length_in(values: list[bytes]) -> int | None:
    """Return what the values of `content-length` say of the body, in bytes; None: nothing, or nothing plain."""
    is_plain = len(values) == 1 and values[0].isdigit() and len(values[0]) <= LONGEST_LENGTH
    return int(values[0]) if is_plain else None
