"""What names a request and what must not change under its key, as hashes.

Everything hashed is made of parts with their lengths before them, so that no two requests are written the same way.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from aidem._http.types import RequestParts, header_values
from aidem._rules.key import hash_constructor, idempotency_key

if TYPE_CHECKING:
    from aidem._http.types import Scope

LENGTH_BYTES: Final = 8
MULTIPART: Final = b"multipart/"

_PARAMETER: Final = re.compile(rb';[ \t]*([^=;"\s]+)=("(?:[^"\\]|\\.)*"|[^;"\s]*)')

_UNSAFE: Final = re.compile(rb"[\0\r\n]")  # no boundary may hold it, and a delimiter could overlap itself or the mark


def parts(*values: bytes) -> bytes:
    """Return a text that says which parts it is made of, whatever is in them."""
    return b"".join([len(value).to_bytes(LENGTH_BYTES, "big") + value for value in values])


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
        self._body = digest if boundary is None else _Multipart(digest, boundary)

    def update(self, chunk: bytes) -> None:
        """Take the next chunk of the body."""
        self._body.update(chunk)

    def hexdigest(self) -> str:
        """Return the hash of the whole request."""
        digest: str = self._body.hexdigest()
        return digest


def request_parts(scope: Scope, body: bytes) -> RequestParts:
    """Return what a `fingerprint` function is called with."""
    return RequestParts(
        method=scope["method"],
        path=full_path(scope),
        query=scope.get("query_string", b""),
        headers=tuple((name, value) for name, value in scope["headers"]),
        content_type=b", ".join(header_values(scope["headers"], b"content-type")).decode("latin-1"),
        body=body,
    )


def chosen_digest(request: RequestParts, chosen: bytes, hash_function: str) -> str:
    """Return the hash of a request whose query, content type and body are represented by what a function chose.

    Method and path always count: a function that forgets them must not hand out the response of another operation.
    """
    text = parts(b"chosen", request.method.encode(), _encoded(request.path), chosen)
    digest: str = _new(hash_function, text).hexdigest()
    return digest


class _Multipart:
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


def full_path(scope: Scope) -> str:
    """Return the path as the client sees it: some frameworks take the prefix of a mounted app off, some do not."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if not root:
        return path
    return path if path == root or path.startswith(f"{root}/") else root + path


def _without_boundary(content_type: bytes) -> tuple[bytes, bytes | None]:
    """Return a content type without the boundary of multipart, and that boundary, if there is one."""
    if content_type[: len(MULTIPART)].lower() == MULTIPART:
        for parameter in _PARAMETER.finditer(content_type):
            name, value = parameter.groups()
            boundary = _unquoted(value)
            if name.lower() == b"boundary" and boundary and not _UNSAFE.search(boundary):
                return content_type[: parameter.start()] + content_type[parameter.end() :], boundary
    return content_type, None


def _unquoted(value: bytes) -> bytes:
    return re.sub(rb"\\(.)", rb"\1", value[1:-1]) if value.startswith(b'"') else value


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _new(hash_function: str, start: bytes = b"") -> Any:
    return hash_constructor(hash_function)(start, usedforsecurity=False)
