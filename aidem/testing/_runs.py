"""The runs of one call: undisturbed, for what can be known of it, then disturbed at one point after the other."""

from __future__ import annotations

import asyncio
import functools
import sys
from collections import Counter
from dataclasses import dataclass, field
from types import CoroutineType
from typing import TYPE_CHECKING, Any, Final

from aidem._rules.record import DataRecord
from aidem.exceptions import IdempotencyPersistenceConnectionError, IdempotencyUsageError
from aidem.persistence import PersistenceLayer
from aidem.testing._lines import Line, innermost_own_line, is_aidem, is_own
from aidem.testing._process import ProcessLoop, TooLong, Vanished

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from aidem.testing._process import Call, Start, Steps
    from aidem.testing._report import CrashWay
    from aidem.testing._watched import WatchedLayers

AFTER_THE_CALL: Final = "after the call"
RENEW: Final = "renew"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A moment at which a call can be disturbed.

    Attributes:
        waits_at: The innermost line of the user's that waits; None: none does.
        ran_last: That one, or else the one that ran last; None: none has.
        when: What the persistence layer is doing.
        occurrence: How many moments before this one were alike in `waits_at` and `when`. Not how many there were at
            all: what reads from a socket does so in more or fewer steps.
    """

    waits_at: Line | None
    ran_last: Line | None
    when: str
    occurrence: int = 0

    def __str__(self) -> str:
        line = "" if self.ran_last is None else f" at {self.ran_last.where}"
        return line + (self.when and f", {self.when}")


@dataclass(slots=True)
class Observed:
    """What a call does when nothing disturbs it.

    Attributes:
        suspensions: Where it waits.
        operations: What it asks of persistence layers.
        end: When it has ended.
        uses_sockets: Whether it waits for any.
        can_differ: Whether it waits for sockets or threads, so that it may take more or fewer steps the next time.
    """

    suspensions: list[Point] = field(default_factory=list[Point])
    operations: list[Point] = field(default_factory=list[Point])
    end: list[Point] = field(default_factory=list[Point])
    uses_sockets: bool = False
    can_differ: bool = False

    _alike: Counter[tuple[Line | None, str]] = field(default_factory=Counter[tuple[Line | None, str]])

    def add_suspension(self, waits_at: Line | None, ran_last: Line | None, when: str) -> None:
        """Take note of one. Renewals count once, however many a long body has."""
        occurrence = self._alike[waits_at, when]
        self._alike[waits_at, when] += 1
        if not (occurrence and RENEW in when):
            self.suspensions.append(Point(waits_at=waits_at, ran_last=ran_last, when=when, occurrence=occurrence))

    def add_operation(self, waits_at: Line | None, ran_last: Line | None, name: str) -> None:
        """Take note of one. Renewals count once."""
        occurrence = sum(point.when == name for point in self.operations)
        if not (occurrence and name == RENEW):
            self.operations.append(Point(waits_at=waits_at, ran_last=ran_last, when=name, occurrence=occurrence))

    def keep_common(self, other: Observed) -> None:
        """Of suspensions and operations that are alike, keep as many as the other has."""
        self.suspensions = [
            point
            for point in self.suspensions
            if point.occurrence == 0 or point.occurrence < other._alike[point.waits_at, point.when]
        ]
        others = {(point.when, point.occurrence) for point in other.operations}
        self.operations = [
            point
            for point in self.operations
            if (point.occurrence == 0 and point.when != RENEW) or (point.when, point.occurrence) in others
        ]

    def points_for(self, way: CrashWay) -> list[Point]:
        """Return where a way leads."""
        if way in {"lost_request", "lost_reply"}:
            return self.operations
        return [*self.suspensions, *self.end] if way == "vanish" else self.suspensions


class _Operations:
    """The operations of persistence layers that a process asks for.

    Attributes:
        begun: The names of those that were begun.
    """

    def __init__(self, process: ProcessLoop, lose: Callable[[CrashWay, str, int], None]) -> None:
        self.begun: list[str] = []
        self._counts: Counter[str] = Counter()
        self._moved = ""
        self._process = process
        self._lose = lose
        self._under_way: dict[tuple[str, int], str] = {}

    @property
    def when(self) -> str:
        """What the one does that was begun last, of those that have not ended; empty: there is none.

        Renewals do not count: they run beside a body, and may end before it or after.
        """
        return next((when for (name, _), when in reversed(self._under_way.items()) if name != RENEW), "")

    def begin(self, name: str, start: Start) -> Awaitable[Any]:
        """Carry one out, as a store does that is elsewhere: it waits before and after."""
        self.begun.append(name)
        occurrence = self._counts[name]
        self._counts[name] += 1
        self._move(name, occurrence, f"before {name} is applied")
        return self._carry_out(name, occurrence, start)

    async def _carry_out(self, name: str, occurrence: int, start: Start) -> Any:
        try:
            await asyncio.sleep(0)
            self._lose("lost_request", name, occurrence)
            self._move(name, occurrence, f"during {name}")
            answer = await self._process.operate(start)
            self._move(name, occurrence, f"after {name} was applied")
            await asyncio.sleep(0)
            self._lose("lost_reply", name, occurrence)
            return answer
        finally:
            del self._under_way[name, occurrence]

    def _move(self, name: str, occurrence: int, when: str) -> None:
        self._under_way[name, occurrence] = self._moved = when

    def take_move(self) -> str:
        """Return what one has come to since this was asked last; empty: none has moved."""
        moved, self._moved = self._moved, ""
        return moved


class ObservedRun:
    """A call that nothing disturbs, for what can be known of it.

    Attributes:
        observed: What is known.
    """

    def __init__(self, call: Call, layers: WatchedLayers, asked_at: Line | None) -> None:
        self.observed = Observed()
        self._call = call
        self._layers = layers
        self._ran_last = asked_at
        self._seen: list[tuple[Line, dict[str, Any] | None]] = []

    def __str__(self) -> str:
        return "undisturbed"

    def lives(self) -> Iterator[Callable[[ProcessLoop], None]]:
        """Yield what each process does."""
        yield self._live

    def _live(self, process: ProcessLoop) -> None:
        operations = self._operations = _Operations(process, _nothing_is_lost)
        process.on_operation = operations.begin
        process.on_step = functools.partial(self._on_step, process)
        process.main = process.start(self._call)
        # Every function that is called shows the layers, and the user's line that runs last. This must do next to
        # nothing: what runs in it cannot be traced.
        sys.setprofile(
            lambda frame, _event, _argument: self._seen.append(
                (Line.of(frame), dict(frame.f_locals) if frame.f_code.co_name == "acquire" else None)
            )
        )
        try:
            process.run_to_end(process.main)
        finally:
            sys.setprofile(None)
        self._look_at_seen(process)
        self.observed.end.append(Point(waits_at=None, ran_last=self._ran_last, when=AFTER_THE_CALL))
        self.observed.uses_sockets = process.uses_sockets
        self.observed.can_differ = process.uses_sockets or process.uses_threads
        process.unwatch()
        process.end()

    def _on_step(self, process: ProcessLoop, steps: Steps, has_ended: bool) -> None:  # noqa: FBT001
        ran = self._look_at_seen(process)
        observed, operations = self.observed, self._operations
        waits_at = _waits_at(process, steps)
        ran_last = (ran if has_ended else None) or waits_at or self._ran_last
        while operations.begun:
            observed.add_operation(waits_at, ran_last, operations.begun.pop(0))
        when = _moment(process, steps, operations, has_ended=has_ended)
        if when is not None:
            observed.add_suspension(waits_at, ran_last, when)

    def _look_at_seen(self, process: ProcessLoop) -> Line | None:
        """Take note of what has run since the last time; return the line of the user's that ran last, if one has."""
        seen, self._seen = self._seen, []
        for _, variables in seen:
            if variables is None:  # most are: a call made here for each would be seen in turn, and so without end
                continue
            arguments: list[Any] = [*variables.values(), None, None]
            layer, record = arguments[:2]
            if isinstance(record, DataRecord) and isinstance(layer, PersistenceLayer) and layer not in self._layers:
                try:
                    self._layers.watch(layer)
                except IdempotencyUsageError as error:
                    process.refuse(error)
                self._layers.note(record)
        ran = next((line for line, _ in reversed(seen) if is_own(line.file)), None)
        self._ran_last = ran or self._ran_last
        return ran


class DisturbedRun:
    """A call that is disturbed once, and made again.

    Attributes:
        outcome: How the call ended that was made again.
        missed: What happened instead of reaching the point; empty: it was reached.
    """

    def __init__(self, call: Call, layers: WatchedLayers, way: CrashWay, point: Point) -> None:
        self.outcome = ""
        self.missed = "did not reach this point: the call took another way"
        self._call = call
        self._layers = layers
        self._way = way
        self._point = point
        self._alike = 0
        self._has_vanished = False
        self._second: asyncio.Task[object] | None = None

    def __str__(self) -> str:
        return f'in the way "{self._way}"{self._point}'

    def lives(self) -> Iterator[Callable[[ProcessLoop], None]]:
        """Yield what each process does."""
        yield self._live
        if self._has_vanished:
            yield self._live_again

    def _live(self, process: ProcessLoop) -> None:
        operations = self._operations = _Operations(process, self._lose)
        process.on_operation = operations.begin
        if self._way not in {"lost_request", "lost_reply"}:
            process.on_step = functools.partial(self._on_step, process)
        process.main = process.start(self._call)
        try:
            process.run_to_end(process.main)
        except TooLong:
            raise
        except Vanished:
            self._has_vanished = True
        if self._point.when == AFTER_THE_CALL:
            self.missed = ""
            self._has_vanished = True
        if self._has_vanished:
            process.vanish()
            return
        process.unwatch()
        if self._second is not None:
            process.run_to_end(self._second)
        self._call_again(process)

    def _live_again(self, process: ProcessLoop) -> None:
        process.main = process.create_task(self._layers.finish())
        process.run_to_end(process.main)
        self._call_again(process)

    def _call_again(self, process: ProcessLoop) -> None:
        self._layers.pass_leases()
        process.main = process.start(self._call)
        self.outcome = process.run_to_end(process.main)
        process.end()

    def _on_step(self, process: ProcessLoop, steps: Steps, has_ended: bool) -> None:  # noqa: FBT001
        when = _moment(process, steps, self._operations, has_ended=has_ended)
        if when != self._point.when or _waits_at(process, steps) != self._point.waits_at:
            return
        self._alike += 1
        if self._alike != self._point.occurrence + 1:
            return
        process.wait_for_threads()
        self.missed = ""
        if self._way == "vanish":
            raise Vanished
        if self._way == "cancel":
            process.main.cancel()
        else:
            process.call_soon(self._start_second, process)

    def _start_second(self, process: ProcessLoop) -> None:
        self._second = process.start(self._call)

    def _lose(self, way: CrashWay, name: str, occurrence: int) -> None:
        if (way, name, occurrence) == (self._way, self._point.when, self._point.occurrence):
            self.missed = ""
            raise IdempotencyPersistenceConnectionError(f"crash_everywhere: a {self._way.replace('_', ' ')}")


def _nothing_is_lost(*_: object) -> None:
    pass


def _moment(process: ProcessLoop, steps: Steps, operations: _Operations, *, has_ended: bool) -> str | None:
    """Return the `when` of a step after which a call can be disturbed; None: it cannot.

    It cannot after its own end. Of tasks of aidem's own, only those count that carry out an operation.
    """
    moved = operations.take_move()
    if process.runs_call(steps):
        return None if has_ended else operations.when
    if steps.coroutine.__class__ is CoroutineType and is_aidem(steps.coroutine.cr_code.co_filename):
        return moved or None
    return operations.when


def _waits_at(process: ProcessLoop, steps: Steps) -> Line | None:
    """Return the user's line at which a task waits; where it is one of aidem's own, the line at which the call does."""
    return innermost_own_line(steps.coroutine) or process.main_waits_at()
