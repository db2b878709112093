"""Additions to an operation in an OpenAPI document: the request header, the problems, the header of a replay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aidem._http import answers
from aidem._http.answers import MAX_KEY_CHARACTERS

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable

    from aidem._http.options import HttpOptions
    from aidem._http.types import Problem

_QUOTED: Final = rf'"([ !#-\[\]-~]|\\["\\]){{1,{MAX_KEY_CHARACTERS}}}"'
_BARE: Final = rf"[!#-+\--:<-~]{{1,{MAX_KEY_CHARACTERS}}}"
_PROBLEMS: Final = (
    answers.KEY_MISSING,
    answers.KEY_MALFORMED,
    answers.CALLER_UNKNOWN,
    answers.BODY_INCOMPLETE,
    answers.IN_PROGRESS,
    answers.NOT_KEPT,
    answers.IN_DOUBT,
    answers.BODY_TOO_LARGE,
    answers.KEY_REUSED,
    answers.STORE_DOWN,
    answers.NOT_RECORDED,
    answers.OUTCOME_UNKNOWN,
)
_WHERE_REQUIRED: Final = (answers.KEY_MISSING, answers.CALLER_UNKNOWN)
STATUSES: Final = frozenset(str(problem.status) for problem in _PROBLEMS)
"""The status codes of the answers of the layer."""
_REPLAYED: Final = {
    "description": "Present if this is the recorded response of an earlier request with the same key.",
    "schema": {"type": "string", "const": "true"},
}
_RETRY_AFTER: Final = {
    "description": "Number of seconds to wait before a retry. Absent if a retry would get the same answer.",
    "schema": {"type": "integer", "minimum": 1},
}


def key_pattern(*, strict: bool) -> str:
    """Return the regular expression, as ECMAScript and Python write it, of all values that the header may have."""
    return f"^{_QUOTED}$" if strict else f"^({_QUOTED}|{_BARE})$"


def key_parameter(options: HttpOptions, *, required: bool) -> dict[str, Any]:
    """Return the header as a parameter of an operation."""
    form = "a quoted string" if options.strict else "a quoted string, or the bare value"
    return {
        "name": options.header_name,
        "in": "header",
        "required": required,
        "description": (
            "Unique key of the request. A retry with the same key gets the response of the first request. "
            f"The value is {form}, of 1 to {MAX_KEY_CHARACTERS} printable ASCII characters."
        ),
        "schema": {"type": "string", "pattern": key_pattern(strict=options.strict)},
    }


def description(options: HttpOptions, status: int, *, validates: bool) -> str:
    """Return the description of the problems with a status."""
    titles = [answers.named(problem, options).title for problem in _by_status(options)[status]]
    return ". ".join(["Validation Error"] * (validates and status == answers.KEY_REUSED.status) + titles)


def responses(
    options: HttpOptions,
    *,
    own: Iterable[str],
    described: Collection[str],
    specified: Collection[str],
    validates: bool,
    schema: dict[str, Any],
) -> dict[str, dict[str, Any]]:
    """Return the responses of an operation, to be merged into those that it has.

    Args:
        options: What the layer was told.
        own: Status codes that the operation itself may answer, and so a replay.
        described: Those whose description is to stay.
        specified: Those whose description of a problem is to stay.
        validates: Whether the framework answers 422 itself.
        schema: The schema of a problem, or a reference to it.
    """
    found: dict[str, dict[str, Any]] = {status: {"headers": {options.replayed_header: _REPLAYED}} for status in own}
    for status, problems in _by_status(options).items():
        response = found.setdefault(str(status), {})
        # Only the service knows what its own format is.
        if options.problem_body is None and str(status) not in specified:
            response["content"] = {answers.MEDIA_TYPE: {"schema": schema}}
        if any(problem.retry_after_seconds is not None for problem in problems):
            response.setdefault("headers", {})["Retry-After"] = _RETRY_AFTER
        if str(status) not in described:
            response["description"] = description(options, status, validates=validates)
    return found


def _by_status(options: HttpOptions) -> dict[int, list[Problem]]:
    found: dict[int, list[Problem]] = {}
    for problem in _PROBLEMS:
        if options.required or problem not in _WHERE_REQUIRED:
            found.setdefault(problem.status, []).append(problem)
    return found
