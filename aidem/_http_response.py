"""A response as it is stored, and as it comes in.

Stored is JSON text: `{"body": "…", "headers": [["name", "value"], …], "status": 200}`. Header names and values are
their bytes as Latin-1. A body of ASCII characters is kept as text, every other as base64 in `base64` instead of `body`.
"""

from __future__ import annotations

import base64
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from aidem._http_types import declared_length, header_values

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
_NOT_STORED: Final = _HOP_BY_HOP | {b"date", REPLAYED[0]}
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
        response: StoredResponse = data
        is_text = response.body.isascii()
        body = response.body if is_text else base64.b64encode(response.body)
        return {
            "body" if is_text else "base64": body.decode("ascii"),
            "headers": [(name.decode("latin-1"), value.decode("latin-1")) for name, value in response.headers],
            "status": response.status,
        }

    def from_dict(self, data: Any) -> StoredResponse:
        """Return the response in a stored form."""
        body = data["body"].encode("ascii") if "body" in data else base64.b64decode(data["base64"], validate=True)
        headers = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in data["headers"]]
        return StoredResponse(int(data["status"]), headers, body)


RESPONSES: Final = StoredResponses()


def text_of(response: StoredResponse) -> str:
    """Return the text under which a response is stored."""
    return json.dumps(RESPONSES.to_dict(response))


class Recorder:
    """Keeps a bounded copy of a response while it goes out.

    Attributes:
        status: Its status code.
        headers: Its header pairs.
        is_complete: Whether everything of it that a client waits for is here.
    """

    __slots__ = ("_body", "_length", "_limit", "_received", "headers", "is_complete", "status")

    def __init__(self, start: Message, *, limit: int) -> None:
        self.status: int = start["status"]
        self.headers = [(bytes(name), bytes(value)) for name, value in start.get("headers", ())]
        self._length = 0 if self.status in _BODILESS else declared_length(self.headers)
        self._limit = limit
        self._body = bytearray()
        self._received = 0
        self.is_complete = False

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
        dropped = _NOT_STORED if store_set_cookie else _NOT_STORED | {b"set-cookie"}
        dropped |= _named_by_connection(self.headers)
        headers = [(name, value) for name, value in self.headers if name.lower() not in dropped]
        return StoredResponse(self.status, headers, bytes(self._body))


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    values = header_values(headers, b"connection")
    return frozenset(name.strip().lower() for value in values for name in value.split(b","))
