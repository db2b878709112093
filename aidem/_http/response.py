"""A response: which ones are stored, the copy that is taken while one goes out, and the text that is stored.

Stored is JSON text: `{"body": "…", "headers": [["name", "value"], …], "status": 200}`. Header names and values are
their bytes as Latin-1. A body of ASCII characters is kept as text, unless base64 is shorter, as of control characters;
every other body is kept as base64, in `base64` instead of `body`.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from http import HTTPStatus
from json.encoder import encode_basestring_ascii as _quoted
from typing import TYPE_CHECKING, Any, Final

from aidem._http.states import Event

if TYPE_CHECKING:
    from aidem._http.types import Headers, Message, Scope

# 307 and 308 ask for the same request elsewhere, 421 on another connection, 426 by another protocol, and 428 with a
# condition: with the same key, which the request that was redirected must not find taken. 423 ends with a lock.
_NOT_STORED: Final = frozenset({307, 308, 401, 403, 408, 421, 422, 423, 425, 426, 428, 429})
_HOP_BY_HOP: Final = frozenset(
    {
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
_DROPPED: Final = _HOP_BY_HOP | {b"date", b"idempotent-replayed"}
_DROPPED_WITH_COOKIES: Final = _DROPPED | {b"set-cookie"}
_BODILESS: Final = frozenset({204, 205, 304})
_STATUSES: Final = range(200, 600)
_LONGEST_LENGTH: Final = 18
# Names and values that servers send, https://www.rfc-editor.org/rfc/rfc9110#section-5, each on a line of its own. For
# others servers raise, when the response has begun.
_HEADERS: Final = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9A-Za-z]+\n[\t -~\x80-\xff]*\n)*")


def length_in(values: list[bytes]) -> int | None:
    """Return the length that the values of `content-length` declare, in bytes; None: none, or no single number."""
    is_plain = len(values) == 1 and values[0].isdigit() and len(values[0]) <= _LONGEST_LENGTH
    return int(values[0]) if is_plain else None


# --- Which responses are stored ---------------------------------------------------------------------------------------


def store_by_default(status: int, headers: Headers) -> bool:
    """Whether a response is final, so that a retry would get the same: 2xx, and most of 3xx and 4xx.

    `Retry-After` asks for another attempt, and a stream of events may never end.
    """
    if status in _NOT_STORED or not 200 <= status < 500:  # noqa: PLR2004 - classes of status codes
        return False
    for name, value in headers:
        lowered = name.lower()
        if lowered == b"retry-after":
            return False
        if lowered == b"content-type" and value.lower().startswith(b"text/event-stream"):
            return False
    return True


def is_of_no_route(scope: Scope, response: ResponseCopy) -> bool:
    """Whether a router answers because the app has no such path or method, so that nothing has run."""
    if response.status == HTTPStatus.METHOD_NOT_ALLOWED:
        allowed = b",".join(response.values(b"allow")).decode("latin-1").replace(" ", "")
        methods = getattr(scope.get("route"), "methods", None) or (allowed and allowed.split(","))
        return bool(methods) and scope["method"] not in methods
    if response.status != HTTPStatus.NOT_FOUND or "router" not in scope:
        return False
    # Starlette's router leaves the endpoint as it was when it finds no route: None, or the app that the router itself
    # is mounted as, maybe within middleware.
    endpoint: Any = scope.get("endpoint")
    if endpoint is None:
        return True
    while endpoint is not None and not hasattr(endpoint, "routes"):
        endpoint = getattr(endpoint, "app", None)
    return endpoint is not None


# --- The copy ---------------------------------------------------------------------------------------------------------


class ResponseCopy:
    """A bounded copy of a response, taken while it goes out.

    Attributes:
        status: Its status code.
        headers: Its header pairs.
        length: The length of its body as its start declares it; None: it does not.
    """

    __slots__ = ("_body", "_limit", "_names", "_received", "headers", "length", "status")

    def __init__(self, start: Message, *, limit: int) -> None:
        self.status: int = start["status"]
        self.headers = [(bytes(name), bytes(value)) for name, value in start.get("headers", ())]
        self._names = [name.lower() for name, _ in self.headers]
        self.length: int | None = None
        if self.status in _BODILESS:
            self.length = 0
        elif b"content-length" in self._names:
            self.length = length_in(self.values(b"content-length"))
        self._limit = limit
        self._body: bytes | bytearray = b""
        self._received = 0

    def add(self, message: Message) -> Event:
        """Copy a part of the body; return whether it is a part, the last part, or makes the copy too large."""
        chunk = message.get("body", b"")
        self._received += len(chunk)
        if max(self._received, self.length or 0) > self._limit:
            self._body = b""
            return Event.OUTGROWN
        if not self._body:
            self._body = bytes(chunk)
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += chunk
        # A client does not wait for the last message when it has as many bytes as it was promised.
        if not message.get("more_body", False) or (self.length is not None and self._received >= self.length):
            return Event.LAST_PART
        return Event.PART

    def text(self, *, store_set_cookie: bool) -> str:
        """Return what is stored of the response."""
        dropped = _DROPPED if store_set_cookie else _DROPPED_WITH_COOKIES
        if b"connection" in self._names:
            dropped |= {name.strip().lower() for value in self.values(b"connection") for name in value.split(b",")}
        headers = [pair for name, pair in zip(self._names, self.headers, strict=True) if name not in dropped]
        return text_of(StoredResponse(self.status, headers, bytes(self._body)))

    def values(self, wanted: bytes) -> list[bytes]:
        """Return all values of a header, whose name is given in lower case."""
        return [value for name, (_, value) in zip(self._names, self.headers, strict=True) if name == wanted]


# --- The text ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that can be sent again: status, header pairs in their order, and body."""

    status: int
    headers: Headers
    body: bytes


def text_of(response: StoredResponse) -> str:
    """Return the text under which a response is stored; written piece by piece, it costs a third of `json.dumps`."""
    headers = ", ".join(
        [f"[{_quoted(name.decode('latin-1'))}, {_quoted(value.decode('latin-1'))}]" for name, value in response.headers]
    )
    body = response.body
    if body.isascii():
        text = _quoted(body.decode("ascii"))
        if len(text) - len('""') <= -(-len(body) // 3) * 4:
            return f'{{"body": {text}, "headers": [{headers}], "status": {response.status}}}'
    encoded = base64.b64encode(body).decode("ascii")
    return f'{{"base64": "{encoded}", "headers": [{headers}], "status": {response.status}}}'


class StoredResponses:
    """The `OutputSerializer` of responses: `from_dict` reads what `text_of` writes."""

    def to_dict(self, data: Any) -> Any:
        """Return the stored form of a response."""
        return json.loads(text_of(data))

    def from_dict(self, data: Any) -> StoredResponse:
        """Return the response in a stored form.

        Raises:
            ValueError: The response cannot be sent, because of a mistake, or because somebody has written to the store.
        """
        body = data["body"].encode("ascii") if "body" in data else base64.b64decode(data["base64"], validate=True)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in data["headers"]]
        response = StoredResponse(data["status"], headers, body)
        if not _is_sendable(response):
            raise ValueError("the stored response is not one that can be sent")
        return response


RESPONSES: Final = StoredResponses()


def _is_sendable(response: StoredResponse) -> bool:
    if type(response.status) is not int or response.status not in _STATUSES:
        return False
    names = [name.lower() for name, _ in response.headers]
    if not _HOP_BY_HOP.isdisjoint(names):
        return False
    lines = b"".join([b"%b\n%b\n" % pair for pair in response.headers])
    if lines.count(b"\n") != 2 * len(names) or not _HEADERS.fullmatch(lines):
        return False
    if response.status in _BODILESS:
        return not response.body
    lengths = [value for name, (_, value) in zip(names, response.headers, strict=True) if name == b"content-length"]
    return not lengths or length_in(lengths) == len(response.body)
