"""A response as it is stored, and as it comes in.

Stored is JSON text: `{"body": "…", "headers": [["name", "value"], …], "status": 200}`. Header names and values are
their bytes as Latin-1. A body of ASCII characters is kept as text, unless base64 is shorter, as of control characters;
every other as base64, in `base64` instead of `body`.
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as _quoted
from typing import TYPE_CHECKING, Any, Final

from aidem._http.types import length_in

if TYPE_CHECKING:
    from aidem._http.types import Headers, Message

REPLAYED: Final = (b"idempotent-replayed", b"true")
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
_DROPPED: Final = _HOP_BY_HOP | {b"date", REPLAYED[0]}
_DROPPED_WITH_COOKIES: Final = _DROPPED | {b"set-cookie"}
_BODILESS: Final = frozenset({204, 205, 304})
_STATUSES: Final = range(200, 600)
# What servers send, https://www.rfc-editor.org/rfc/rfc9110#section-5; others raise, when the answer has begun.
_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
_VALUE: Final = re.compile(rb"[\t -~\x80-\xff]*")


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that can be sent again: status, header pairs in their order, and body."""

    status: int
    headers: Headers
    body: bytes


class StoredResponses:
    """The `OutputSerializer` of responses; `text_of` writes what `from_dict` understands."""

    def to_dict(self, data: Any) -> Any:
        """Return the stored form of a response."""
        return json.loads(text_of(data))

    def from_dict(self, data: Any) -> StoredResponse:
        """Return the response in a stored form.

        Raises:
            ValueError: It cannot be sent; a mistake, or somebody has written to the store.
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
    lengths: list[bytes] = []
    for name, value in response.headers:
        lowered = name.lower()
        if lowered in _HOP_BY_HOP or not (_NAME.fullmatch(name) and _VALUE.fullmatch(value)):
            return False
        if lowered == b"content-length":
            lengths.append(value)
    if response.status in _BODILESS:
        return not response.body
    return not lengths or length_in(lengths) == len(response.body)


def text_of(response: StoredResponse) -> str:
    """Return the text under which a response is stored; written piece by piece, it costs a third of `json.dumps`."""
    kind, body = _written(response.body)
    headers = ", ".join(
        f"[{_quoted(name.decode('latin-1'))}, {_quoted(value.decode('latin-1'))}]" for name, value in response.headers
    )
    return f'{{"{kind}": {body}, "headers": [{headers}], "status": {response.status}}}'


def _written(body: bytes) -> tuple[str, str]:
    """Return the name of what is stored of a body, and it as JSON: the shorter of text and base64."""
    if body.isascii():
        text = _quoted(body.decode("ascii"))
        if len(text) - len('""') <= -(-len(body) // 3) * 4:
            return "body", text
    return "base64", f'"{base64.b64encode(body).decode("ascii")}"'


class ResponseCopy:
    """Keeps a bounded copy of a response while it goes out.

    Attributes:
        status: Its status code.
        headers: Its header pairs.
        is_complete: Whether everything of it that a client waits for is here.
    """

    __slots__ = ("_body", "_length", "_limit", "_names", "_received", "headers", "is_complete", "status")

    def __init__(self, start: Message, *, limit: int) -> None:
        self.status: int = start["status"]
        self.headers = [(bytes(name), bytes(value)) for name, value in start.get("headers", ())]
        self._names = [name.lower() for name, _ in self.headers]
        self._length = self._declared_length()
        self._limit = limit
        self._body = bytearray()
        self._received = 0
        self.is_complete = False

    def _declared_length(self) -> int | None:
        if self.status in _BODILESS:
            return 0
        return length_in(self.values(b"content-length")) if b"content-length" in self._names else None

    @property
    def is_declared(self) -> bool:
        """Whether its head says where its body ends, so that it most likely comes at once."""
        return self._length is not None

    @property
    def is_too_large(self) -> bool:
        """Whether it is, or says that it will be, larger than the copy may be."""
        return max(self._received, self._length or 0) > self._limit

    def add(self, message: Message) -> None:
        """Take the next message of the body."""
        chunk = message.get("body", b"")
        self._received += len(chunk)
        if not self.is_too_large:
            self._body += chunk
        # A client does not wait for the last message when it has as many bytes as it was promised.
        is_all_here = self._length is not None and self._received >= self._length
        self.is_complete = is_all_here or not message.get("more_body", False)

    def response(self, *, store_set_cookie: bool) -> StoredResponse:
        """Return what is stored of it."""
        dropped = _DROPPED if store_set_cookie else _DROPPED_WITH_COOKIES
        if b"connection" in self._names:
            dropped |= {name.strip().lower() for value in self.values(b"connection") for name in value.split(b",")}
        headers = [pair for name, pair in zip(self._names, self.headers, strict=True) if name not in dropped]
        return StoredResponse(self.status, headers, bytes(self._body))

    def values(self, wanted: bytes) -> list[bytes]:
        """Return all values of a header, whose name is given in lower case."""
        return [value for name, (_, value) in zip(self._names, self.headers, strict=True) if name == wanted]
