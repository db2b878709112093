"""What the HTTP layer adds to an operation in an OpenAPI document: the header, its answers, the mark of a replay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aidem import _http_answers as answers
from aidem._http_key import MAX_KEY_CHARACTERS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from aidem._http_answers import Problem
    from aidem._http_options import HttpOptions

KEY_HEADER: Final = "Idempotency-Key"
REPLAYED_HEADER: Final = "Idempotent-Replayed"
MEDIA_TYPE: Final = "application/problem+json"
UNPROCESSABLE: Final = 422

_QUOTED: Final = rf'"([ !#-\[\]-~]|\\["\\]){{1,{MAX_KEY_CHARACTERS}}}"'
_BARE: Final = rf"[!#-+\--:<-~]{{1,{MAX_KEY_CHARACTERS}}}"
_PROBLEMS: Final = (
    answers.KEY_MISSING,
    answers.KEY_MALFORMED,
    answers.IN_PROGRESS,
    answers.NOT_KEPT,
    answers.IN_DOUBT,
    answers.BODY_TOO_LARGE,
    answers.KEY_REUSED,
    answers.STORE_DOWN,
    answers.NOT_RECORDED,
    answers.OUTCOME_UNKNOWN,
)
_PROBLEM_SCHEMA: Final = {
    "title": "Problem",
    "type": "object",
    "properties": {
        "type": {"type": "string", "format": "uri-reference"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
    },
    # No list: older versions of FastAPI merge into what routes share, again and again, and it would grow.
    "required": ("type", "title", "status", "detail"),
}
_REPLAYED: Final = {
    "description": "The response is that of an earlier request with the same key.",
    "schema": {"type": "string", "const": "true"},
}
_RETRY_AFTER: Final = {
    "description": "After how many seconds the same request makes sense again, if it does.",
    "schema": {"type": "integer", "minimum": 1},
}


def key_pattern(*, strict: bool) -> str:
    """Return the regular expression, as ECMAScript and Python write it, of all values that the header may have."""
    return f"^{_QUOTED}$" if strict else f"^({_QUOTED}|{_BARE})$"


def key_parameter(options: HttpOptions, *, required: bool) -> dict[str, Any]:
    """Return the header as a parameter of an operation."""
    form = "a quoted string" if options.strict else "a quoted string, or the bare value"
    return {
        "name": KEY_HEADER,
        "in": "header",
        "required": required,
        "description": (
            f"Names the request: whoever repeats it with the same key gets the first response; {form}, "
            f"of 1 to {MAX_KEY_CHARACTERS} visible ASCII characters."
        ),
        "schema": {"type": "string", "pattern": key_pattern(strict=options.strict)},
    }


def responses(
    options: HttpOptions, *, own: Iterable[str], described: Collection[str], validates: bool
) -> dict[str, dict[str, Any]]:
    """Return the responses of an operation, to be merged into those that it has.

    Args:
        options: What the layer was told.
        own: Status codes that the operation itself may answer, and so a replay.
        described: Those whose description is to stay.
        validates: Whether the framework answers 422 itself.
    """
    found: dict[str, dict[str, Any]] = {status: {"headers": {REPLAYED_HEADER: _REPLAYED}} for status in own}
    for status, problems in _by_status(options).items():
        response = found.setdefault(str(status), {})
        response["content"] = {MEDIA_TYPE: {"schema": _PROBLEM_SCHEMA}}
        if any(problem.is_temporary for problem in problems):
            response.setdefault("headers", {})["Retry-After"] = _RETRY_AFTER
        if str(status) not in described:
            titles = [problem.title for problem in problems]
            response["description"] = ". ".join(["Validation Error"] * (validates and status == UNPROCESSABLE) + titles)
    return found


def _by_status(options: HttpOptions) -> dict[int, list[Problem]]:
    found: dict[int, list[Problem]] = {}
    for problem in _PROBLEMS:
        if options.required or problem is not answers.KEY_MISSING:
            found.setdefault(problem.status, []).append(problem)
    return found
