"""What names a request and what must not change under its key, as hashes.

Everything hashed is made of parts with their lengths before them, so that no two requests are written the same way.
"""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING, Any, Final

from aidem._http_types import header_values
from aidem._key import idempotency_key

if TYPE_CHECKING:
    from aidem._http_types import Scope

LENGTH_BYTES: Final = 8
MULTIPART: Final = b"multipart/"

_PARAMETER: Final = re.compile(rb';[ \t]*([^=;"\s]+)=("(?:[^"\\]|\\.)*"|[^;"\s]*)')


def parts(*values: bytes) -> bytes:
    """Return a text that says which parts it is made of, whatever is in them."""
    return b"".join(len(value).to_bytes(LENGTH_BYTES, "big") + value for value in values)


def lookup_key(prefix: str, *, space: str | None, key: str, hash_function: str) -> str:
    """Return the key of the record.

    Args:
        prefix: Keeps services apart.
        space: Whose key it is; None: it is everybody's.
        key: What the header names.
        hash_function: A name of `hashlib`.
    """
    owned = [_encoded(key)] if space is None else [_encoded(space), _encoded(key)]
    return idempotency_key(prefix, _new(hash_function, parts(*owned)).hexdigest())


class Fingerprint:
    """The hash of method, path, query, content type and body; the body is hashed as it comes.

    Whoever repeats a multipart request may write another boundary between its parts: that one does not count.
    """

    __slots__ = ("_body",)

    def __init__(self, scope: Scope, hash_function: str) -> None:
        content_types = header_values(scope["headers"], b"content-type")
        boundary = None
        if len(content_types) == 1:
            content_types[0], boundary = _without_boundary(content_types[0])
        head = parts(
            b"body" if boundary is None else b"multipart",
            scope["method"].encode(),
            _encoded(full_path(scope)),
            scope.get("query_string", b""),
            *content_types,
        )
        digest = _new(hash_function, head)
        self._body = digest if boundary is None else _Multipart(digest, boundary, hash_function)

    def update(self, chunk: bytes) -> None:
        """Take the next chunk of the body."""
        self._body.update(chunk)

    def hexdigest(self) -> str:
        """Return the hash of the whole request."""
        digest: str = self._body.hexdigest()
        return digest


class _Multipart:
    """Hashes a multipart body as the list of what stands between its boundaries."""

    __slots__ = ("_all", "_delimiter", "_hash_function", "_piece", "_rest")

    def __init__(self, digest: Any, boundary: bytes, hash_function: str) -> None:
        self._all = digest
        self._delimiter = b"\r\n--" + boundary
        self._hash_function = hash_function
        self._piece = _new(hash_function)
        self._rest = b"\r\n"  # the first boundary stands at the start of the body, or on a line of its own

    def update(self, chunk: bytes) -> None:
        *ended, rest = (self._rest + chunk).split(self._delimiter)
        for piece in ended:
            self._piece.update(piece)
            self._all.update(self._piece.digest())
            self._piece = _new(self._hash_function)
        kept = len(self._delimiter) - 1  # it may be the start of a delimiter
        self._piece.update(rest[:-kept])
        self._rest = rest[-kept:]

    def hexdigest(self) -> str:
        self._piece.update(self._rest)
        self._all.update(self._piece.digest())
        digest: str = self._all.hexdigest()
        return digest


def full_path(scope: Scope) -> str:
    """Return the path as the client sees it: some frameworks take the prefix of a mounted app off, some do not."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    return path if path == root or path.startswith(f"{root}/") else root + path


def _without_boundary(content_type: bytes) -> tuple[bytes, bytes | None]:
    """Return a content type without the boundary of multipart, and that boundary, if there is one."""
    if content_type[: len(MULTIPART)].lower() == MULTIPART:
        for parameter in _PARAMETER.finditer(content_type):
            name, value = parameter.groups()
            boundary = _unquoted(value)
            if name.lower() == b"boundary" and boundary:
                return content_type[: parameter.start()] + content_type[parameter.end() :], boundary
    return content_type, None


def _unquoted(value: bytes) -> bytes:
    return re.sub(rb"\\(.)", rb"\1", value[1:-1]) if value.startswith(b'"') else value


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _new(hash_function: str, start: bytes = b"") -> Any:
    return hashlib.new(hash_function, start, usedforsecurity=False)
