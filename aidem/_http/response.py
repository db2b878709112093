"""A response: which ones are stored, the copy that is taken while one goes out, and the text that is stored.

Stored is JSON text: `{"body": "…", "headers": [["name", "value"], …], "status": 200}`. Header names and values are
their bytes as Latin-1. A body of ASCII characters is kept as text, unless base64 is shorter, as of control characters;
every other body is kept as base64, in `base64` instead of `body`.
"""

from __future__ import annotations

import base64
import inspect
import json
import re
import sys
from json.encoder import encode_basestring_ascii as _quoted
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aidem._http.states import Event
from aidem._rules.abandoned import Happened
from aidem.exceptions import IdempotencySerializationError, IdempotencyUsageError

if TYPE_CHECKING:
    from aidem._http.types import Headers, Message, Scope
    from aidem._rules.abandoned import AbandonedExecution, Check

# 307 and 308 ask for the same request elsewhere, 421 on another connection, 426 by another protocol, and 428 with a
# condition: with the same key, which the request that was redirected must not find taken. 423 ends with a lock.
_NOT_STORED: Final = frozenset({307, 308, 401, 403, 408, 421, 422, 423, 425, 426, 428, 429})
_NOT_FOUND, _METHOD_NOT_ALLOWED = 404, 405
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
_SENDABLE: Final = re.compile(
    rb"(?:(?!(?i:%b)\n)[!#$%%&'*+\-.^_`|~0-9A-Za-z]+\n[\t -~\x80-\xff]*\n)*" % b"|".join(sorted(_HOP_BY_HOP))
)
_NOT_SENDABLE: Final = "the stored response is not one that can be sent"
# Names of their own: to look a member up on its enum costs as much as a call.
_PART, _LAST_PART, _OUTGROWN = Event.PART, Event.LAST_PART, Event.OUTGROWN


def length_in(values: list[bytes]) -> int | None:
    """Return the length that the values of `content-length` declare, in bytes; None: none, or no single number."""
    if len(values) == 1 and values[0].isdigit() and len(values[0]) <= _LONGEST_LENGTH:
        return int(values[0])
    return None


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
    if response.status not in (_NOT_FOUND, _METHOD_NOT_ALLOWED):
        return False
    if response.status == _METHOD_NOT_ALLOWED:
        allowed = b",".join(response.values(b"allow")).decode("latin-1").replace(" ", "")
        methods = getattr(scope.get("route"), "methods", None) or (allowed and allowed.split(","))
        return bool(methods) and scope["method"] not in methods
    if "router" not in scope:
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
        self.headers: Headers = []
        self._names: list[bytes] = []
        for name, value in start.get("headers", ()):
            pair = bytes(name), bytes(value)
            self.headers.append(pair)
            self._names.append(pair[0].lower())
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
        if self._received > self._limit or (self.length is not None and self.length > self._limit):
            self._body = b""
            return _OUTGROWN
        if not self._body:
            self._body = bytes(chunk)
        else:
            if isinstance(self._body, bytes):
                self._body = bytearray(self._body)
            self._body += chunk
        # A client does not wait for the last message when it has as many bytes as it was promised.
        if not message.get("more_body", False) or (self.length is not None and self._received >= self.length):
            return _LAST_PART
        return _PART

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


class StoredResponse(NamedTuple):
    """A response that can be sent again: status, header pairs in their order, and body.

    Names and values of headers are bytes, and so is the body: `StoredResponse(201, [(b"location", b"/7")], b"")`.
    """

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

    def __init__(self, *, max_body_bytes: int = sys.maxsize) -> None:
        self._max_body_bytes = max_body_bytes

    def to_dict(self, data: Any) -> Any:
        """Return the stored form of a response.

        Raises:
            IdempotencySerializationError: Its body is larger than allowed.
        """
        if len(data.body) > self._max_body_bytes:
            raise IdempotencySerializationError("the body of the response is larger than max_response_bytes")
        return json.loads(text_of(data))

    def from_dict(self, data: Any) -> StoredResponse:
        """Return the response in a stored form.

        Raises:
            ValueError: The response cannot be sent, because of a mistake, or because somebody has written to the store.
        """
        status, pairs = data["status"], data["headers"]
        body = data["body"].encode("ascii") if "body" in data else base64.b64decode(data["base64"], validate=True)
        # All of them at once. If one has a line break, there are more lines than names and values.
        text = "".join([name + "\n" + value + "\n" for name, value in pairs]).encode("latin-1")
        lines = text.split(b"\n")
        if len(lines) != 2 * len(pairs) + 1 or not _SENDABLE.fullmatch(text) or type(status) is not int:
            raise ValueError(_NOT_SENDABLE)
        headers = list(zip(lines[:-1:2], lines[1::2], strict=True))
        lengths = [value for name, value in headers if name.lower() == b"content-length"]
        has_its_length = not body if status in _BODILESS else not lengths or length_in(lengths) == len(body)
        if status not in _STATUSES or not has_its_length:
            raise ValueError(_NOT_SENDABLE)
        return StoredResponse(status, headers, body)


RESPONSES: Final = StoredResponses()


# --- What a check says ------------------------------------------------------------------------------------------------


class ResponseCheck:
    """A check of the user's, with whose verdict the engine can act: what happened is a response as it is recorded."""

    __slots__ = ("_check", "_store_set_cookie")

    def __init__(self, check: Check, *, store_set_cookie: bool) -> None:
        self._check = check
        self._store_set_cookie = store_set_cookie

    async def __call__(self, abandoned: AbandonedExecution) -> Any:
        """Ask the check; return its verdict.

        Raises:
            IdempotencyUsageError: What it says happened is no response that can be recorded.
            Exception: What the check raises.
        """
        verdict = self._check(abandoned)
        if inspect.isawaitable(verdict):
            verdict = await verdict
        if not isinstance(verdict, Happened):
            return verdict
        result = verdict.result
        status, headers, body = result if isinstance(result, StoredResponse) else _of_starlette(result)
        try:
            copy = ResponseCopy({"status": status, "headers": headers}, limit=sys.maxsize)
            copy.add({"body": body})
            return Happened(RESPONSES.from_dict(json.loads(copy.text(store_set_cookie=self._store_set_cookie))))
        except (TypeError, ValueError) as error:
            message = "Happened(response): this response cannot be sent; look at its status, headers and length"
            raise IdempotencyUsageError(message) from error


def _of_starlette(result: Any) -> StoredResponse:
    """Return the parts of a response of Starlette, which code that makes one has imported."""
    framework = sys.modules.get("starlette.responses")
    if framework is None or not isinstance(result, framework.Response) or not hasattr(result, "body"):
        raise IdempotencyUsageError(
            f"Happened({type(result).__name__}): over HTTP this must be a Response of Starlette that has its body, "
            "such as JSONResponse, or aidem.asgi.StoredResponse(status, headers, body)"
        )
    if getattr(result, "background", None) is not None:
        raise IdempotencyUsageError("Happened(response): the response has a background task, which would never run")
    return StoredResponse(result.status_code, result.raw_headers, result.body)
