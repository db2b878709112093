"""Two sides measured in turn, round by round, and the median of their ratios.

Other processes share the machine, its clock frequency moves, and its caches are warm or cold. So the sides take turns,
in changing order, each round has a ratio of its own, and what counts is the median of these: a disturbance strikes
single rounds, and a slow minute strikes both sides. The first round warms up and does not count.

Wall time and CPU time of this process are both taken. The CPU time is judged where one process does all the work, since
it leaves out what other processes take (`cpu`). Where a server, a disk or a second thread takes part, waiting is part
of what a caller pays, and the wall time is judged (`wall`).

Garbage is collected before each lap, so that no lap pays for what another has left. Collections within it stay on: they
are part of what a call costs.
"""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from statistics import median
from typing import TYPE_CHECKING, Literal, NamedTuple, TypeAlias

from benchmarks._rows import Row

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping

    from benchmarks._rows import Target

Call: TypeAlias = "Callable[[str], Awaitable[object]]"
"""A call with a key."""

OURS = "aidem"

_numbers = count()


@dataclass(frozen=True, slots=True)
class Effort:
    """How much to measure."""

    quick: bool = False

    def rounds(self, usual: int) -> int:
        """Return how many rounds a race has."""
        return min(2, usual) if self.quick else usual

    def calls(self, usual: int) -> int:
        """Return how many calls a lap has, or how large something is made."""
        return max(1, usual // 20) if self.quick else usual


class Lap(NamedTuple):
    """Seconds a call."""

    wall: float
    cpu: float


class Stopwatch:
    """Takes the laps of one round of one side."""

    def __init__(self) -> None:
        self.laps: dict[str, Lap] = {}

    @contextmanager
    def lap(self, name: str, *, calls: int) -> Iterator[None]:
        """Time a block that makes so many calls."""
        gc.collect()
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        self.laps[name] = Lap(wall / calls, cpu / calls)


@dataclass(frozen=True, slots=True)
class Race:
    """The laps of all rounds by the names of the sides."""

    rounds: Mapping[str, list[dict[str, Lap]]]

    def times(
        self, what: str, *, lap: str, against: str, by: Literal["cpu", "wall"], target: Target | None = None
    ) -> Row:
        """Return the row that compares microseconds a call."""
        return self._row(what, lap, against, by, target, unit="µs")

    def rates(
        self, what: str, *, lap: str, against: str, by: Literal["cpu", "wall"], target: Target | None = None
    ) -> Row:
        """Return the row that compares calls a second."""
        return self._row(what, lap, against, by, target, unit="calls/s")

    def _row(
        self,
        what: str,
        lap: str,
        against: str,
        by: Literal["cpu", "wall"],
        target: Target | None,
        *,
        unit: Literal["µs", "calls/s"],
    ) -> Row:
        figure = _microseconds if unit == "µs" else _per_second
        ours, theirs = ([figure(laps[lap]) for laps in self.rounds[side]] for side in (OURS, against))
        ratios = [Lap(*(o / t for o, t in zip(*pair, strict=True))) for pair in zip(ours, theirs, strict=True)]
        other: Literal["cpu", "wall"] = "wall" if by == "cpu" else "cpu"
        return Row(
            what=what,
            against=against,
            ours=median(getattr(each, by) for each in ours),
            theirs=median(getattr(each, by) for each in theirs),
            unit=unit,
            ratio=median(getattr(each, by) for each in ratios),
            target=target,
            clock=by,
            other_ratio=median(getattr(each, other) for each in ratios),
        )


def race(contenders: Mapping[str, Callable[[Stopwatch], None]], *, rounds: int) -> Race:
    """Let each contender run its round, then the next round, in changing order; ours is called `aidem`."""
    laps: dict[str, list[dict[str, Lap]]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(rounds + 1):
        for name in names:
            stopwatch = Stopwatch()
            contenders[name](stopwatch)
            if number > 0:
                laps[name].append(stopwatch.laps)
        names = [*names[1:], names[0]]
    return Race(laps)


async def first_and_replay(stopwatch: Stopwatch, call: Call, *, calls: int, tasks: Iterable[int]) -> None:
    """Time first calls with fresh keys and then their replays, under names such as `first/32` for 32 at a time."""
    for at_once in tasks:
        keys = fresh_keys(calls if at_once > 1 else calls // 4 + 1)
        for name in ("first", "replay"):
            with stopwatch.lap(f"{name}/{at_once}", calls=len(keys)):
                await spread(call, keys, tasks=at_once)


def one_after_another(call: Callable[[str], object], *, calls: int) -> Callable[[Stopwatch], None]:
    """Return the contender that does the same with a blocking call."""

    def contender(stopwatch: Stopwatch) -> None:
        keys = fresh_keys(calls // 4 + 1)
        for name in ("first", "replay"):
            with stopwatch.lap(f"{name}/1", calls=len(keys)):
                for key in keys:
                    call(key)

    return contender


async def spread(call: Call, keys: Iterable[str], *, tasks: int) -> None:
    """Make a call for each key, so many at a time."""
    remaining = iter(keys)

    async def work() -> None:
        for key in remaining:
            await call(key)

    await asyncio.gather(*(work() for _ in range(tasks)))


def fresh_keys(count: int) -> list[str]:
    """Return texts that no call in this process had as its key before."""
    return [f"order-{number}" for number in islice(_numbers, count)]


def _microseconds(lap: Lap) -> Lap:
    return Lap(lap.wall * 1e6, lap.cpu * 1e6)


def _per_second(lap: Lap) -> Lap:
    return Lap(1 / lap.wall, 1 / lap.cpu)
