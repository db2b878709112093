"""What is read of a request: its key, its body, and the hashes that name it and say what must not change on a retry.

The header is a structured-field string, as RFC 8941 (section 3.3.3) writes it: `"8e03978e"`. Many clients send the bare
value instead, so that is understood as well, unless the layer is strict. Both forms of a value name the same key.

Everything hashed is made of parts with their lengths before them, so that two requests are never hashed from the same
bytes.
"""

from __future__ import annotations

import re
import struct
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from aidem._http.answers import (
    BODY_INCOMPLETE,
    BODY_TOO_LARGE,
    KEY_MALFORMED,
    KEY_MISSING,
    MAX_KEY_CHARACTERS,
    RefusedError,
)
from aidem._http.response import length_in
from aidem._http.types import RequestParts
from aidem._rules.key import hash_constructor, idempotency_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aidem._http.types import Message, Receive, Scope

MULTIPART: Final = b"multipart/"
PIECE_BYTES: Final = 64 * 1024
"""Smaller chunks are joined up to this: each is a message, and a client that sends single bytes must cost no more."""

OF_A_REQUEST: Final = "http:"
"""What the payload hash of a request begins with: it tells operators that the outcome is a response."""

_length: Final = struct.Struct(">Q").pack
_QUOTED: Final = re.compile(rb'"([ !#-\[\]-~]*(?:\\["\\][ !#-\[\]-~]*)*)"')
_BARE: Final = re.compile(rb"[!#-+\--:<-~]+")  # visible ASCII without `"`, `,` and `;`
_ESCAPED: Final = re.compile(rb"\\(.)")
_PARAMETER: Final = re.compile(rb';[ \t]*([^=;"\s]+)=("(?:[^"\\]|\\.)*"|[^;"\s]*)')
_UNSAFE: Final = re.compile(rb"[\0\r\n]")  # not allowed in a boundary: a delimiter could overlap itself or the mark


class HeaderLines:
    """The header lines of a request by name. Most requests send each header once, and are read without a search."""

    __slots__ = ("_are_distinct", "_last", "_lines")

    def __init__(self, scope: Scope) -> None:
        self._lines = scope["headers"]
        self._last: dict[bytes, bytes] = dict(self._lines)
        self._are_distinct = len(self._last) == len(self._lines)

    def values(self, name: bytes) -> list[bytes]:
        """Return the value of every line of a header; ASGI writes names in lower case."""
        if name not in self._last:
            return []
        return [self._last[name]] if self._are_distinct else [value for found, value in self._lines if found == name]


# --- The key ----------------------------------------------------------------------------------------------------------


def parse_key(values: Sequence[bytes], *, strict: bool) -> str:
    """Return the key that the values of the header name.

    Args:
        values: The value of every header line of that name.
        strict: Whether only a structured-field string is understood.

    Raises:
        RefusedError: They name no key. The message says why, and does not show the value.
    """
    if not values:
        raise RefusedError(KEY_MISSING)
    if len(values) > 1:
        raise RefusedError(KEY_MALFORMED, "The header was sent more than once.")
    key = values[0].strip(b" \t")
    if quoted := _QUOTED.fullmatch(key):
        key = _ESCAPED.sub(rb"\1", quoted[1]) if b"\\" in quoted[1] else quoted[1]
    elif key and strict:
        raise RefusedError(KEY_MALFORMED, 'The value is not a quoted string; quote it: "...".')
    elif key and not _BARE.fullmatch(key):
        reason = "The value is neither one quoted string nor visible ASCII characters without quotes, commas and"
        raise RefusedError(KEY_MALFORMED, f"{reason} semicolons.")
    if not key:
        raise RefusedError(KEY_MALFORMED, "The key is empty.")
    if len(key) > MAX_KEY_CHARACTERS:
        raise RefusedError(KEY_MALFORMED, f"The key is longer than {MAX_KEY_CHARACTERS} characters.")
    return key.decode("ascii")


def lookup_key(prefix: str, *, space: str | None, key: str, hash_function: str) -> str:
    """Return the idempotency key of a request.

    Args:
        prefix: Keeps services apart.
        space: Whose key it is; None: it is everybody's.
        key: What the header names.
        hash_function: A name of `hashlib`.
    """
    name = key.encode("utf-8", "surrogatepass")
    owned = parts(name) if space is None else parts(space.encode("utf-8", "surrogatepass"), name)
    return idempotency_key(prefix, hash_constructor(hash_function)(owned, usedforsecurity=False).hexdigest())


# --- The body ---------------------------------------------------------------------------------------------------------


class Request:
    """A request. Its body is read and hashed before the key is claimed, then handed on to the app.

    Attributes:
        values: Returns the values of a header, whose name is given in lower case.
    """

    __slots__ = ("_pieces", "_receive", "_scope", "values")

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._scope = scope
        self._receive = receive
        self._pieces: deque[bytes | bytearray] = deque()
        self.values = HeaderLines(scope).values

    async def read(self, *, limit: int, hash_function: str) -> str:
        """Read the body into memory; return the hash of the request.

        Args:
            limit: How many bytes the body may have.
            hash_function: A name of `hashlib`.

        Raises:
            RefusedError: The body is too large, or the client went before all of it had come.
        """
        declared = self.values(b"content-length")
        if declared and (length_in(declared) or 0) > limit:
            raise RefusedError(BODY_TOO_LARGE)  # before the client is told to go on sending
        digest = request_digest(self._scope, self.values(b"content-type"), hash_function)
        received = 0
        more_body = True
        while more_body:
            message = await self._receive()
            if message["type"] != "http.request":
                raise RefusedError(BODY_INCOMPLETE)  # half a request must not run
            chunk = message.get("body", b"")
            received += len(chunk)
            if received > limit:
                raise RefusedError(BODY_TOO_LARGE)
            digest.update(chunk)
            self._keep(chunk)
            more_body = message.get("more_body", False)
        payload_hash: str = digest.hexdigest()
        return payload_hash

    def _keep(self, chunk: bytes) -> None:
        if not self._pieces or len(self._pieces[-1]) >= PIECE_BYTES:
            self._pieces.append(bytes(chunk))
        elif isinstance(last := self._pieces[-1], bytearray):
            last += chunk
        else:
            self._pieces[-1] = bytearray(last + chunk)

    @property
    def whole(self) -> bytes:
        """All of the body, before any of it is handed on."""
        return b"".join(self._pieces)

    @property
    def rest(self) -> Receive:
        """The `receive` for an app that the layer does not look at: the server's own if nothing was read."""
        return self.receive if self._pieces else self._receive

    async def receive(self) -> Message:
        """Return the next message: the body that was read, then messages of the server."""
        if not self._pieces:
            return await self._receive()
        piece = bytes(self._pieces.popleft())
        return {"type": "http.request", "body": piece, "more_body": bool(self._pieces)}


# --- What must not change on a retry ----------------------------------------------------------------------------------


def request_digest(scope: Scope, content_types: list[bytes], hash_function: str) -> Any:
    """Return the hash of method, path, query and content type, to be updated with the body as it comes.

    Clients may choose another multipart boundary for each attempt, so the boundary does not count.
    """
    boundary = None
    if len(content_types) == 1:
        content_type, boundary = _without_boundary(content_types[0])
        content_types = [content_type]
    head = parts(
        b"body" if boundary is None else b"multipart",
        scope["method"].encode(),
        full_path(scope).encode("utf-8", "surrogatepass"),
        scope.get("query_string", b""),
        *content_types,
    )
    digest = hash_constructor(hash_function)(head, usedforsecurity=False)
    return digest if boundary is None else _MultipartDigest(digest, boundary)


def request_parts(scope: Scope, body: bytes) -> RequestParts:
    """Return what a `fingerprint` function is called with."""
    return RequestParts(
        method=scope["method"],
        path=full_path(scope),
        query=scope.get("query_string", b""),
        headers=tuple((name, value) for name, value in scope["headers"]),
        content_type=b", ".join(HeaderLines(scope).values(b"content-type")).decode("latin-1"),
        body=body,
    )


def chosen_digest(request: RequestParts, chosen: bytes, hash_function: str) -> str:
    """Return the hash of a request whose query, content type and body are represented by what a function chose.

    Method and path always count: a function that forgets them must not hand out the response of another operation.
    """
    text = parts(b"chosen", request.method.encode(), request.path.encode("utf-8", "surrogatepass"), chosen)
    digest: str = hash_constructor(hash_function)(text, usedforsecurity=False).hexdigest()
    return digest


def parts(*values: bytes) -> bytes:
    """Return a text that says which parts it is made of, whatever is in them."""
    text = b""
    for value in values:
        text += _length(len(value)) + value
    return text


def full_path(scope: Scope) -> str:
    """Return the path as the client sees it: some frameworks take the prefix of a mounted app off, some do not."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if not root:
        return path
    return path if path == root or path.startswith(f"{root}/") else root + path


class _MultipartDigest:
    """Hashes a multipart body with a mark in place of every boundary."""

    __slots__ = ("_delimiter", "_digest", "_rest")

    def __init__(self, digest: Any, boundary: bytes) -> None:
        self._digest = digest
        self._delimiter = b"\r\n--" + boundary
        self._rest = b"\r\n"  # the first boundary stands at the start of the body, or on a line of its own

    def update(self, chunk: bytes) -> None:
        text = self._rest + chunk
        end = max(0, len(text) - len(self._delimiter) + 1)  # what follows may be the start of a delimiter
        if (last := text.rfind(self._delimiter)) >= 0:
            end = max(end, last + len(self._delimiter))
        self._take(text[:end])
        self._rest = text[end:]

    def hexdigest(self) -> str:
        self._take(self._rest)
        self._rest = b""
        digest: str = self._digest.hexdigest()
        return digest

    def _take(self, text: bytes) -> None:
        self._digest.update(text.replace(b"\0", b"\0\0").replace(self._delimiter, b"\0\1"))


def _without_boundary(content_type: bytes) -> tuple[bytes, bytes | None]:
    """Return a content type without the boundary of multipart, and that boundary, if there is one."""
    if content_type[: len(MULTIPART)].lower() == MULTIPART:
        for parameter in _PARAMETER.finditer(content_type):
            name, value = parameter.groups()
            boundary = _ESCAPED.sub(rb"\1", value[1:-1]) if value.startswith(b'"') else value
            if name.lower() == b"boundary" and boundary and not _UNSAFE.search(boundary):
                return content_type[: parameter.start()] + content_type[parameter.end() :], boundary
    return content_type, None
