"""The answers of the layer itself, in place of the app's response: problems as RFC 9457 writes them, and replays."""

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
MAX_KEY_CHARACTERS: Final = 255
MEDIA_TYPE: Final = "application/problem+json"
RETRY_AFTER_SECONDS: Final = 1
"""A request that runs may end at any moment, and a store that is down may come back."""
RETRY_CHECK_SECONDS: Final = 10
"""A retry of a request in doubt asks the check again, which learns more once requests of the owner have timed out."""

KEY_MISSING: Final = Problem(
    name="key-missing",
    status=400,
    title="Idempotency-Key is missing",
    detail="This operation requires an Idempotency-Key header. Send one, with the same value on every retry.",
)
KEY_MALFORMED: Final = Problem(
    name="key-malformed",
    status=400,
    title="Idempotency-Key is malformed",
    detail=(
        "Send one Idempotency-Key header whose value is a quoted string of 1 to "
        f"{MAX_KEY_CHARACTERS} printable ASCII characters."
    ),
)
CALLER_UNKNOWN: Final = Problem(
    name="caller-unknown",
    status=400,
    title="The caller of a request with an Idempotency-Key is unknown",
    detail="An Idempotency-Key belongs to the caller who sends it. Send the request with credentials.",
)
BODY_INCOMPLETE: Final = Problem(
    name="body-incomplete",
    status=400,
    title="The request body is incomplete",
    detail="The request was not processed. Send it again.",
)
IN_PROGRESS: Final = Problem(
    name="in-progress",
    status=409,
    title="A request with this Idempotency-Key is in progress",
    detail="Retry later with the same Idempotency-Key to get its response.",
    retry_after_seconds=RETRY_AFTER_SECONDS,
)
NOT_KEPT: Final = Problem(
    name="response-not-kept",
    status=409,
    title="The request was processed, but its response was not stored",
    detail="It will not be processed again under this Idempotency-Key. Look up its result in another way.",
)
IN_DOUBT: Final = Problem(
    name="in-doubt",
    status=409,
    title="It is not known whether the request was processed",
    detail=(
        "An earlier attempt was interrupted. The request will not be processed again under this Idempotency-Key; "
        "check whether it took effect."
    ),
)
IN_DOUBT_UNDER_CHECK: Final = replace(
    IN_DOUBT,
    detail=(
        "An earlier attempt was interrupted, and it could not be found out yet whether it took effect. "
        "Retry later with the same Idempotency-Key to get its response."
    ),
    retry_after_seconds=RETRY_CHECK_SECONDS,
)
BODY_TOO_LARGE: Final = Problem(
    name="body-too-large",
    status=413,
    title="The body is too large for a request with an Idempotency-Key",
    detail="The request was not processed. Send a smaller body.",
)
KEY_REUSED: Final = Problem(
    name="key-reused",
    status=422,
    title="Idempotency-Key was used for a different request",
    detail="Retry the original request unchanged, or send a new Idempotency-Key.",
)
STORE_DOWN: Final = Problem(
    name="store-down",
    status=503,
    title="Idempotency cannot be guaranteed at the moment",
    detail="The request was not processed. Retry later with the same Idempotency-Key.",
    retry_after_seconds=RETRY_AFTER_SECONDS,
)
NOT_RECORDED: Final = Problem(
    name="not-recorded",
    status=503,
    title="The request was processed, but this could not be recorded",
    detail="Look up its result in another way. A retry with the same Idempotency-Key may process it again.",
)
OUTCOME_UNKNOWN: Final = Problem(
    name="outcome-unknown",
    status=503,
    title="The outcome of the request is not known",
    detail="Another attempt took over. Retry later with the same Idempotency-Key to get its response.",
    retry_after_seconds=RETRY_AFTER_SECONDS,
)
HTTP_EXCEPTION: Final = "refused"
"""The name of the problem for an `HTTPException` that a scope function raises; its texts are that one's."""

_PROBLEMS_OF_ERRORS: Final[tuple[tuple[type[IdempotencyError], Problem], ...]] = (
    (IdempotencyValidationError, KEY_REUSED),
    (IdempotencyAlreadyInProgressError, IN_PROGRESS),
    (IdempotencyInDoubtError, IN_DOUBT),
    (IdempotencyResultUnavailableError, NOT_KEPT),
    (IdempotencyPersistenceLayerError, STORE_DOWN),
)
ANSWERED_ERRORS: Final[tuple[type[IdempotencyError], ...]] = tuple(kind for kind, _ in _PROBLEMS_OF_ERRORS)
"""The errors of a call that is begun for which the client gets a problem."""


class RefusedError(Exception):
    """The request is refused: the client gets a problem, and the app does not run.

    Attributes:
        problem: The answer.
        headers: Further headers of the answer.
    """

    def __init__(self, problem: Problem, reason: str = "", *, headers: Headers | None = None) -> None:
        """Refuse a request.

        Args:
            problem: The answer.
            reason: A sentence that says what in particular is wrong. It goes before the detail of the problem.
            headers: Further headers of the answer.
        """
        super().__init__(reason or problem.title)
        self.problem = replace(problem, detail=f"{reason} {problem.detail}") if reason else problem
        self.headers = headers or []

    @classmethod
    def by(cls, error: IdempotencyError, *, has_check: bool) -> RefusedError:
        """Return the refusal for one of `ANSWERED_ERRORS`; `has_check`: a retry of a request in doubt asks a check."""
        problem = next(problem for kind, problem in _PROBLEMS_OF_ERRORS if isinstance(error, kind))
        return cls(IN_DOUBT_UNDER_CHECK if problem is IN_DOUBT and has_check else problem)

    @classmethod
    def by_http_exception(cls, error: Any) -> RefusedError:
        """Return the refusal that Starlette's `HTTPException` asks for: its status, detail and headers."""
        title = responses.get(error.status_code, "Refused")
        problem = Problem(name=HTTP_EXCEPTION, status=error.status_code, title=title, detail=error.detail)
        raised = dict[str, str](error.headers or {}).items()
        headers = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in raised]
        return cls(problem, headers=headers)


def is_http_exception(error: Exception) -> bool:
    """Whether an exception is Starlette's `HTTPException`. Code that raises one has imported Starlette."""
    framework = sys.modules.get("starlette.exceptions")
    return framework is not None and isinstance(error, framework.HTTPException)


def named(problem: Problem, options: HttpOptions) -> Problem:
    """Return a problem whose texts name the header as the options do."""
    if options.header_name == KEY_HEADER:
        return problem
    title, detail = (text.replace(KEY_HEADER, options.header_name) for text in (problem.title, problem.detail))
    return replace(problem, title=title, detail=detail)


async def send_problem(
    problem: Problem, options: HttpOptions, scope: Scope, send: Send, *, headers: Iterable[tuple[bytes, bytes]] = ()
) -> None:
    """Send a problem as the response."""
    if problem.name != HTTP_EXCEPTION:
        problem = named(problem, options)
        url = options.documentation_url
        if url is not None:
            problem = replace(problem, type=f"{url}{'' if url.endswith(('/', '#')) else '#'}{problem.name}")
    body, content_type = _body_of(problem, options, scope)
    own = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    if problem.retry_after_seconds is not None:
        own.append((b"retry-after", str(problem.retry_after_seconds).encode()))
    await _respond(send, problem.status, [*own, *headers], body)


def _body_of(problem: Problem, options: HttpOptions, scope: Scope) -> tuple[bytes, bytes]:
    if options.problem_body is not None:
        try:
            body, content_type = options.problem_body(problem, scope)
            return b"".join([body]), content_type.encode("latin-1")  # fails for text where bytes belong
        except Exception as error:  # noqa: BLE001 - the client gets an answer although a function of the user's fails
            # No trace: it may show what is in the request.
            message = "problem_body of the HTTP layer %r failed (%s); it must return (bytes, content_type)"
            logger.error(message, options.key_prefix, type(error).__name__)  # noqa: TRY400
    content = {"type": problem.type, "title": problem.title, "status": problem.status, "detail": problem.detail}
    return json.dumps(content).encode(), MEDIA_TYPE.encode()


async def send_replay(call: Call, options: HttpOptions, scope: Scope, send: Send) -> None:
    """Send the response that is recorded for the call."""
    try:
        response = outcome_of(call, RESPONSES)
    except IdempotencyResultUnavailableError:
        response = None
    if response is None:  # also when somebody has completed the record by hand
        await send_problem(NOT_KEPT, options, scope, send)
    else:
        mark = options.replay_mark
        headers = [pair for pair in response.headers if pair[0].lower() != mark]
        headers.append((mark, b"true"))
        await _respond(send, response.status, headers, response.body)


async def _respond(send: Send, status: int, headers: Headers, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
