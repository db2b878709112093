"""What is seen of a call on either side, and how two such sights differ."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

Records = tuple[dict[str, str], ...]

ABSENT = "absent"
NO_RECORD = dict[str, str]()
LONG = 1000
LEFT_LEASE = "in_progress_expiration of completed records"

KINDS_OF_WARNINGS = {
    r"[Nn]o idempotency key.*(found|Skipping)": "no key",
    r"Couldn't determine the remaining time": "no remaining time",
    r"Disabling idempotency|runs without idempotency; never set it in production": "disabled",
    r"result.*stored": "result not stored",
}


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One step of a scenario on one side.

    Attributes:
        answer: What came back: `returned …`, or `raised …`.
        meanings: The names of all errors that a raised one is.
        ran: The arguments of each run of the body.
        claims: The records that were there when the body began.
        records: The records that are left.
        warned: The kinds of warnings.
    """

    answer: str
    meanings: frozenset[str] = frozenset()
    ran: tuple[str, ...] = ()
    claims: tuple[dict[str, str], ...] = ()
    records: tuple[dict[str, str], ...] = ()
    warned: frozenset[str] = frozenset()


NOT_REACHED = Seen(answer="not reached")


@dataclass(frozen=True)
class Difference:
    """One aspect of one step in which the sides differ.

    Attributes:
        step: Its number; 0 is the decoration.
        aspect: `answer`, `ran`, `warned`, or an attribute of a record, such as `records.data`.
    """

    step: int
    aspect: str
    powertools: str
    aidem: str


def differences(theirs: Sequence[Seen], ours: Sequence[Seen]) -> set[Difference]:
    return {
        Difference(step, aspect, *sides)
        for step, (their, our) in enumerate(zip_longest(theirs, ours, fillvalue=NOT_REACHED))
        for aspect, *sides in _aspects(their, our)
    }


def _aspects(their: Seen, our: Seen) -> Iterator[tuple[str, str, str]]:
    """Yield what differs; what follows from that is left out."""
    # An error of ours may be a special case of theirs: whoever handles theirs handles it.
    if their.answer != our.answer and their.answer not in our.meanings:
        yield "answer", their.answer, our.answer
    if their is NOT_REACHED or our is NOT_REACHED:
        return
    if their.warned != our.warned:
        yield "warned", _listed(sorted(their.warned)), _listed(sorted(our.warned))
    if their.ran != our.ran:
        yield "ran", _listed(their.ran), _listed(our.ran)
    else:
        yield from _records("claims", their.claims, our.claims)
    yield from _records("records", their.records, our.records)


def _records(aspect: str, their: Records, our: Records) -> Iterator[tuple[str, str, str]]:
    for their_record, our_record in zip_longest(their, our, fillvalue=NO_RECORD):
        is_same_status = their_record.get("status") == our_record.get("status")
        for attribute in sorted({*their_record, *our_record}) if is_same_status else ["status"]:
            values = their_record.get(attribute, ABSENT), our_record.get(attribute, ABSENT)
            if values[0] != values[1]:
                is_left = attribute == "in_progress_expiration" and their_record["status"] == "'COMPLETED'"
                yield LEFT_LEASE if is_left else f"{aspect}.{attribute}", *values


def _listed(texts: Sequence[str]) -> str:
    return ", ".join(texts) or "nothing"


def answer_of(error: BaseException) -> tuple[str, frozenset[str]]:
    """Return how an error is shown, and under which names a handler of Powertools' errors would catch it."""
    return f"raised {type(error).__name__}", frozenset(f"raised {cls.__name__}" for cls in type(error).__mro__)


def shown(value: Any) -> str:
    """Return a value with its types, whatever the order of its keys."""
    if isinstance(value, dict):
        return "{" + ", ".join(sorted(f"{key!r}: {shown(item)}" for key, item in value.items())) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(shown, value)) + "]"
    if isinstance(value, str) and len(value) > LONG:
        return f"{len(value)} characters"
    # Neither an address nor the fields of a wrapper say anything.
    return (
        type(value).__name__
        if getattr(type(value), "__repr__", None) is object.__repr__ or hasattr(value, "raw_event")
        else repr(value)
    )


def kinds_of(caught: Sequence[warnings.WarningMessage]) -> frozenset[str]:
    texts = [str(warning.message) for warning in caught if issubclass(warning.category, UserWarning)]
    return frozenset(
        next((kind for pattern, kind in KINDS_OF_WARNINGS.items() if re.search(pattern, text)), text) for text in texts
    )
