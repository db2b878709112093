"""A response as it is stored, and as it comes in.

Stored is JSON text: `{"body": "…", "headers": [["name", "value"], …], "status": 200}`. Header names and values are
their bytes as Latin-1. A body of ASCII characters is kept as text, every other as base64 in `base64` instead of `body`.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii as _quoted
from typing import TYPE_CHECKING, Any, Final

from aidem._http_types import length_in

if TYPE_CHECKING:
    from aidem._http_types import Headers, Message

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
        """Return the response in a stored form."""
        body = data["body"].encode("ascii") if "body" in data else base64.b64decode(data["base64"], validate=True)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in data["headers"]]
        return StoredResponse(int(data["status"]), headers, body)


RESPONSES: Final = StoredResponses()


def text_of(response: StoredResponse) -> str:
    """Return the text under which a response is stored; written piece by piece, it costs a third of `json.dumps`."""
    is_text = response.body.isascii()
    body = (response.body if is_text else base64.b64encode(response.body)).decode("ascii")
    headers = ", ".join(
        f"[{_quoted(name.decode('latin-1'))}, {_quoted(value.decode('latin-1'))}]" for name, value in response.headers
    )
    kind = "body" if is_text else "base64"
    return f'{{"{kind}": {_quoted(body)}, "headers": [{headers}], "status": {response.status}}}'


class Recorder:
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
        return length_in(self._values(b"content-length")) if b"content-length" in self._names else None

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
            dropped |= {name.strip().lower() for value in self._values(b"connection") for name in value.split(b",")}
        headers = [pair for name, pair in zip(self._names, self.headers, strict=True) if name not in dropped]
        return StoredResponse(self.status, headers, bytes(self._body))

    def _values(self, wanted: bytes) -> list[bytes]:
        return [value for name, (_, value) in zip(self._names, self.headers, strict=True) if name == wanted]
