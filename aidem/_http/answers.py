"""The answers that the layer itself gives: `application/problem+json`, as RFC 9457 writes it, and replays."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from http.client import responses
from typing import TYPE_CHECKING, Any, Final

from aidem._api.execution import outcome_of
from aidem._http.response import RESPONSES
from aidem._http.types import Problem
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyError,
    IdempotencyInDoubtError,
    IdempotencyPersistenceLayerError,
    IdempotencyResultUnavailableError,
    IdempotencyValidationError,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aidem._engine.call import Call
    from aidem._http.options import HttpOptions
    from aidem._http.types import Headers, Scope, Send

logger = logging.getLogger("aidem")

KEY_HEADER: Final = "Idempotency-Key"
"""The name of the header in the texts below; clients are told the name that the options give it."""
MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER_SECONDS: Final = 1
"""After how many seconds a client may try again: a request that runs may end at any moment, a store come back."""


KEY_MISSING: Final = Problem(
    name="key-missing",
    status=400,
    title="Idempotency-Key is missing",
    detail="This operation must not run twice: send an Idempotency-Key header, and the same one when you retry.",
)
KEY_MALFORMED: Final = Problem(
    name="key-malformed",
    status=400,
    title="Idempotency-Key is malformed",
    detail="Send one Idempotency-Key header whose value is a quoted string of 1 to 255 visible ASCII characters",
)
CALLER_UNKNOWN: Final = Problem(
    name="caller-unknown",
    status=400,
    title="The caller of a request with an Idempotency-Key is unknown",
    detail="This operation must not run twice, and keys belong to their callers: send the request with credentials.",
)
BODY_INCOMPLETE: Final = Problem(
    name="body-incomplete",
    status=400,
    title="The body of the request is incomplete",
    detail="Nothing was done; repeat the whole request.",
)
IN_PROGRESS: Final = Problem(
    name="in-progress",
    status=409,
    title="A request with this Idempotency-Key is in progress",
    detail="Repeat the same request later to get its response.",
    is_temporary=True,
)
NOT_KEPT: Final = Problem(
    name="response-not-kept",
    status=409,
    title="The request is done, its response was not kept",
    detail="It will not run again under this Idempotency-Key; look its result up by other means.",
)
IN_DOUBT: Final = Problem(
    name="in-doubt",
    status=409,
    title="Whether the request was done is not known",
    detail="It was broken off and will not run again under this Idempotency-Key; find out whether it took effect.",
)
BODY_TOO_LARGE: Final = Problem(
    name="body-too-large",
    status=413,
    title="The body is too large for a request with an Idempotency-Key",
    detail="Nothing was done; send a smaller body.",
)
KEY_REUSED: Final = Problem(
    name="key-reused",
    status=422,
    title="Idempotency-Key was used for another request",
    detail="Repeat the original request unchanged, or send a new Idempotency-Key.",
)
STORE_DOWN: Final = Problem(
    name="store-down",
    status=503,
    title="Idempotency cannot be guaranteed at the moment",
    detail="Nothing was done; repeat the same request later.",
    is_temporary=True,
)
NOT_RECORDED: Final = Problem(
    name="not-recorded",
    status=503,
    title="The request is done, but that could not be recorded",
    detail="Look its result up by other means: repeated later under the same Idempotency-Key, it may run again.",
)
OUTCOME_UNKNOWN: Final = Problem(
    name="outcome-unknown",
    status=503,
    title="The outcome of the request is unknown",
    detail="Another attempt took over; repeat the same request later, with the same Idempotency-Key.",
    is_temporary=True,
)

_REFUSALS: Final[tuple[tuple[type[IdempotencyError], Problem], ...]] = (
    (IdempotencyValidationError, KEY_REUSED),
    (IdempotencyAlreadyInProgressError, IN_PROGRESS),
    (IdempotencyInDoubtError, IN_DOUBT),
    (IdempotencyResultUnavailableError, NOT_KEPT),
    (IdempotencyPersistenceLayerError, STORE_DOWN),
)
REFUSED: Final[tuple[type[IdempotencyError], ...]] = tuple(kind for kind, _ in _REFUSALS)
"""The errors before the app runs that are answers to the client."""


def problem_of(error: IdempotencyError) -> Problem:
    """Return what the client is told about an error in `REFUSED`."""
    return next(problem for kind, problem in _REFUSALS if isinstance(error, kind))


def is_http_exception(error: Exception) -> bool:
    """Whether an exception is Starlette's `HTTPException`; whoever raises one has imported Starlette."""
    framework = sys.modules.get("starlette.exceptions")
    return framework is not None and isinstance(error, framework.HTTPException)


def named(problem: Problem, options: HttpOptions) -> Problem:
    """Return a problem whose texts name the header as the options do."""
    if options.header_name == KEY_HEADER:
        return problem
    title, detail = (text.replace(KEY_HEADER, options.header_name) for text in (problem.title, problem.detail))
    return replace(problem, title=title, detail=detail)


class Answers:
    """Answers one request in place of the app."""

    __slots__ = ("_options", "_scope", "_send")

    def __init__(self, options: HttpOptions, scope: Scope, send: Send) -> None:
        self._options = options
        self._scope = scope
        self._send = send

    async def answer(self, problem: Problem, *, because: str = "") -> None:
        """Send a problem as the response.

        Args:
            problem: What to say.
            because: What in particular is wrong.
        """
        problem = named(problem, self._options)
        if because:
            problem = replace(problem, detail=f"{problem.detail}: {because}.")
        if self._options.documentation_url is not None:
            problem = replace(problem, type=_below(self._options.documentation_url, problem.name))
        await self._tell(problem)

    async def refuse(self, error: Exception) -> None:
        """Send what a scope function has raised: an `HTTPException` as an answer, with its status, detail and headers.

        Raises:
            Exception: It is another error, or Starlette's handlers of exceptions are further out and answer it.
        """
        if not is_http_exception(error) or "starlette.exception_handlers" in self._scope:
            raise error
        raised: Any = error
        status: int = raised.status_code
        title = responses.get(status, "Refused")
        headers = dict[str, str](raised.headers or {}).items()
        await self._tell(
            Problem(name="refused", status=status, title=title, detail=raised.detail),
            [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers],
        )

    async def hand_out(self, call: Call) -> None:
        """Send what is recorded for the call."""
        try:
            response = outcome_of(call, RESPONSES)
        except IdempotencyResultUnavailableError:
            response = None
        if response is None:  # or somebody has completed the record by hand
            await self.answer(NOT_KEPT)
        else:
            mark = self._options.replayed_header.lower().encode("ascii")
            headers = [pair for pair in response.headers if pair[0].lower() != mark]
            await self._respond(response.status, [*headers, (mark, b"true")], response.body)

    async def _tell(self, problem: Problem, headers: Iterable[tuple[bytes, bytes]] = ()) -> None:
        body, content_type = self._body_of(problem)
        own = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
        if problem.is_temporary:
            own.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
        await self._respond(problem.status, [*own, *headers], body)

    def _body_of(self, problem: Problem) -> tuple[bytes, bytes]:
        if self._options.problem_body is not None:
            try:
                body, content_type = self._options.problem_body(problem, self._scope)
                return b"".join([body]), content_type.encode("latin-1")  # text is no bytes
            except Exception as error:  # noqa: BLE001 - whatever a function of the user's raises, the client gets an answer
                # No trace: it may show what is in the request.
                prefix, name = self._options.key_prefix, type(error).__name__
                message = "problem_body of the HTTP layer %r failed (%s); it must return (bytes, content_type)"
                logger.error(message, prefix, name)  # noqa: TRY400
        content = {"type": problem.type, "title": problem.title, "status": problem.status, "detail": problem.detail}
        return json.dumps(content).encode(), MEDIA_TYPE.encode()

    async def _respond(self, status: int, headers: Headers, body: bytes) -> None:
        await self._send({"type": "http.response.start", "status": status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body})


def _below(url: str, name: str) -> str:
    return url + name if url.endswith(("/", "#")) else f"{url}#{name}"
