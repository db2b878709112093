"""The answers that the layer itself gives: `application/problem+json`, as RFC 9457 writes it, and replays."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aidem._execution import outcome_of
from aidem._http_response import REPLAYED, RESPONSES
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyError,
    IdempotencyInDoubtError,
    IdempotencyPersistenceLayerError,
    IdempotencyResultUnavailableError,
    IdempotencyValidationError,
)

if TYPE_CHECKING:
    from aidem._engine import Call
    from aidem._http_types import Headers, Send

RETRY_AFTER_SECONDS: Final = 1
"""After how many seconds a client may try again: a request that runs may end at any moment, a store come back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """One kind of refusal.

    Attributes:
        name: What it is called in the documentation: the last part of its `type`.
        status: The status code.
        title: What it is, in a few words.
        detail: What to do.
        is_temporary: Whether the same request may succeed later, so that `Retry-After` is sent.
    """

    name: str
    status: int
    title: str
    detail: str
    is_temporary: bool = False


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


async def answer(send: Send, problem: Problem, *, documentation_url: str | None, because: str = "") -> None:
    """Send a problem as the response.

    Args:
        send: Takes the messages.
        problem: What to say.
        documentation_url: What `type` starts with; None: there is nothing to point at.
        because: What in particular is wrong.
    """
    content = {
        "type": "about:blank" if documentation_url is None else _below(documentation_url, problem.name),
        "title": problem.title,
        "status": problem.status,
        "detail": f"{problem.detail}: {because}." if because else problem.detail,
    }
    body = json.dumps(content).encode()
    headers: Headers = [
        (b"content-type", b"application/problem+json"),
        (b"content-length", str(len(body)).encode()),
    ]
    if problem.is_temporary:
        headers.append((b"retry-after", str(RETRY_AFTER_SECONDS).encode()))
    await _send_response(send, problem.status, headers, body)


async def hand_out(call: Call, send: Send, *, documentation_url: str | None) -> None:
    """Send what is recorded for the call."""
    try:
        response = outcome_of(call, RESPONSES)
    except IdempotencyResultUnavailableError:
        response = None
    if response is None:  # or somebody has completed the record by hand
        await answer(send, NOT_KEPT, documentation_url=documentation_url)
    else:
        await _send_response(send, response.status, [*response.headers, REPLAYED], response.body)


async def _send_response(send: Send, status: int, headers: Headers, body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _below(url: str, name: str) -> str:
    return url + name if url.endswith(("/", "#")) else f"{url}#{name}"
