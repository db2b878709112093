"""What `crash_everywhere` has found out."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from dataclasses import dataclass
from textwrap import shorten
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Iterable

CrashWay = Literal["vanish", "cancel", "lost_request", "lost_reply", "second_caller"]

_HEADINGS: Final = ("runs", "effects", "way", "where", "line", "when", "outcome")


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashPoint:
    """One run: the call was disturbed at one point, then time passed, and it was called again to its end.

    Attributes:
        way: What happened there, see `crash_everywhere`.
        where: `file:number` of the innermost line of your own code. If no line of yours was waiting, as while aidem
            records a result, the one that ran last.
        line: The source of that line.
        when: More about the moment: which operation of the persistence layer was under way, and whether it had been
            applied; `"after the call"` when the call had ended, but its caller did not learn of it. Default: `""`.
        effects: What `effects()` answered at the end of the run.
        outcome: How the call ended that was made again: `"returned"` or `"raised "` with the name of the exception. If
            the point was not reached, what happened instead.
        reached: Whether the run came to its point. Default: True. False means that the call takes different ways in
            different runs, so nothing was shown.
    """

    way: CrashWay
    where: str
    line: str
    effects: int
    outcome: str
    when: str = ""
    reached: bool = True


@dataclass(frozen=True, slots=True)
class CrashReport:
    """All runs of one `crash_everywhere`; `str()` makes a table, in which runs that are alike share a row.

    Attributes:
        points: The runs in the order in which they were made.
    """

    points: tuple[CrashPoint, ...]

    def check(self, *, at_least: int = 1, at_most: int = 1) -> None:
        """Assert that the effect happened as often as it should, wherever the call was disturbed.

        Args:
            at_least: The smallest number of effects that is right. Default: 1. With `on_abandoned="raise"` it is 0.
            at_most: The largest number of effects that is right. Default: 1.

        Raises:
            AssertionError: It did not in some runs, or some did not reach their point; the message is a table of them.
        """
        wrong = [point for point in self.points if not at_least <= point.effects <= at_most or not point.reached]
        if not wrong:
            return
        allowed = str(at_most) if at_least == at_most else f"{at_least} to {at_most}"
        missed = sum(not point.reached for point in wrong)
        unreached = f"; {missed} did not reach their point, so the call differs from run to run" if missed else ""
        raise AssertionError(
            f"{len(wrong)} of {len(self.points)} runs are wrong: the effect must happen {allowed} times"
            f"{unreached}\n{_table(wrong)}"
        )

    def as_json(self) -> str:
        """Return the points as a JSON array of objects, with the attributes of `CrashPoint` as their names."""
        return json.dumps([dataclasses.asdict(point) for point in self.points], indent=2)

    def __str__(self) -> str:
        return _table(self.points)


def _table(points: Iterable[CrashPoint]) -> str:
    counted = Counter(points)
    rows = [
        (str(runs), str(point.effects), point.way, point.where, shorten(point.line, 60), point.when, point.outcome)
        for point, runs in counted.items()
    ]
    widths = [max(map(len, column)) for column in zip(_HEADINGS, *rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in (_HEADINGS, *rows))
    return "\n".join(lines)
