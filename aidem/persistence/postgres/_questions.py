"""A question to the server, and what its answer may call for: to be asked again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, TypeAlias, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aidem.persistence.postgres._statements import Statement

T = TypeVar("T")

PAUSES_SECONDS: Final = (0.0, 0.002, 0.01, 0.05)
"""How long to wait before a question is asked again; from then on the last one."""


class Again(Enum):
    """What is read from a row that another transaction is changing, so that it does not say yet what becomes of it."""

    AGAIN = auto()


AGAIN: Final = Again.AGAIN
MaybeAgain: TypeAlias = "T | Literal[Again.AGAIN]"
Rows: TypeAlias = "Sequence[Any]"


class Reply(NamedTuple):
    """What has come back.

    Attributes:
        rows: Its rows.
        is_held: Whether the question was asked again so often that whoever holds the record will not let go soon.
    """

    rows: Rows
    is_held: bool

    @classmethod
    def of(cls, rows: Rows, *, found_held: int) -> Reply:
        """Return the reply to a question after which the record was found to be held so often."""
        return cls(rows, found_held >= len(PAUSES_SECONDS))

    @property
    def row(self) -> Any | None:
        """The one row, if there is any."""
        return self.rows[0] if self.rows else None


@dataclass(frozen=True, slots=True)
class Question(Generic[T]):
    """A statement with its arguments.

    Attributes:
        statement: What to execute.
        arguments: Its arguments.
        read: Reads the answer from the reply.
    """

    statement: Statement
    arguments: tuple[Any, ...]
    read: Callable[[Reply], MaybeAgain[T]]


def next_pause(asked_again: int, *, remaining_seconds: float, timeout_seconds: float) -> float | None:
    """Return how long to wait before a question that was asked again so often is asked once more.

    None: there is no time for that, as a tenth of it is kept for the try itself.
    """
    longest = PAUSES_SECONDS[min(asked_again, len(PAUSES_SECONDS) - 1)]
    pause = longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter: many fail at the same moment
    return pause if pause + timeout_seconds / 10 < remaining_seconds else None
