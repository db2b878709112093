"""`crash_everywhere`: a call dies, is cancelled, loses its store, meets a second caller, at each of its suspensions."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import sys
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Final, cast, get_args

from aidem._checks import refused
from aidem.testing._lines import Line, own_line_of_thread
from aidem.testing._process import ProcessLoop, TooLong, misuse
from aidem.testing._report import CrashPoint, CrashReport, CrashWay
from aidem.testing._runs import DisturbedRun, Observed, ObservedRun, Point
from aidem.testing._watched import WatchedLayers

if TYPE_CHECKING:
    from aidem.testing._clock import FakeClock
    from aidem.testing._process import Call

ATTEMPTS: Final = 3
"""How often a run is made that does not come to its point, since a call on sockets takes one turn more or less."""

WAYS: Final[tuple[CrashWay, ...]] = get_args(CrashWay)


async def crash_everywhere(
    call: Callable[[], Awaitable[object]],
    *,
    clock: FakeClock,
    effects: Callable[[], int | Awaitable[int]],
    reset: Callable[[], object] | None = None,
    ways: Collection[CrashWay] = WAYS,
    timeout_seconds: float = 10.0,
) -> CrashReport:
    """Disturb a call at each of its suspensions, once in each way, call it again, and count its effects.

    A suspension is an `await` that really waits: in your function, in what it calls, in a task that it starts, and in
    aidem, where each operation of the persistence layer waits before and after it is applied. For each there is a run:
    `reset()`; the call is started and disturbed there; the clock moves past the end of all leases; the call is made
    again, to its end; `effects()` is read. Before the next run the clock moves to when all records have expired.

    The ways to disturb a call:

    - `"vanish"`: the process dies. Whatever ran on its event loop is never resumed: no `except`, no `finally`, no
      finalizer runs. Connections break, and SQLite rolls back what was not committed on those of aiosqlite, and of
      `sqlite3` in a variable of an async function. The call is made again in another process. Once more after the call
      has ended.
    - `"cancel"`: the task of the call is cancelled.
    - `"lost_request"`, `"lost_reply"`: each operation of the persistence layer fails once as a connection error,
      before it was applied or after.
    - `"second_caller"`: another task of the same process makes the same call at the same time.

    Each process is an event loop in a thread of its own, in a copy of the context of this call. `reset` and `effects`
    are called in the thread and the event loop of the test. `asyncio.sleep` takes no time, unless sockets or threads
    are in use. Nothing is printed or kept of arguments and results.

    What it does not see: effects between two suspensions count as one place, so it does not tell whether the process
    dies before or after the first of two. Threads of executors, anyio and aiosqlite are waited for and end before their
    process vanishes; other threads, and subprocesses, go on. What your code keeps in memory survives, as it would not
    in a process that dies: make it anew in `call` or `reset`. A handler of `aidem.sync` cannot be
    called: a thread cannot be made to vanish.

    Args:
        call: Starts the call, and is called anew each time, on the event loop of the run: `lambda: charge(order)`. For
            a handler made by `lambda_handler`: `lambda: handler.__wrapped__(event, context)`. For an ASGI
            app: a request, for example by `httpx.ASGITransport`.
        clock: The clock of every persistence layer that the call asks; pass it to each as `clock=`.
        effects: Returns how often the effect has happened since `reset`. May be async.
        reset: Forgets all effects. May be async. Default: nothing is forgotten, so `effects` has to count for itself.
        ways: Which of the ways to go. Default: all of them.
        timeout_seconds: How long each call may take, in real seconds. Default: 10.

    Returns:
        A point for each run, whether it is right or not; `check()` asserts that all are.

    Raises:
        IdempotencyUsageError: The call cannot be awaited, or asks a persistence layer that does not go by `clock`;
            `reset` or `effects` has failed.
        IdempotencyConfigError: `ways` or `timeout_seconds` cannot be used.
        TimeoutError: A call did not end in time; the message names the way, the point, and the line at which it waits.
    """
    _check(ways, timeout_seconds)
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        raise misuse("the test must run on an asyncio event loop; aidem does not support trio") from None
    asked_at = own_line_of_thread(sys._getframe())  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    trial = _Trial(call, clock, timeout_seconds, loop, asked_at)
    counter = _Counter(effects, reset)
    try:
        observed = await trial.observe(counter)
        points = [
            await trial.disturb(way, point, counter)
            for way in WAYS
            if way in ways
            for point in observed.points_for(way)
        ]
    finally:
        trial.layers.give_back()
    if not points:
        raise misuse("these ways have no point, since the call asks no persistence layer and never waits")
    return CrashReport(tuple(points))


def _check(ways: object, timeout_seconds: object) -> None:
    chosen: set[object] = set()
    shown = repr(ways)
    if isinstance(ways, Collection) and not isinstance(ways, str):
        chosen.update(cast("Collection[object]", ways))
    if not chosen or not chosen <= set(WAYS):
        raise refused("ways", shown, f"a collection of some of {', '.join(WAYS)}")
    if not isinstance(timeout_seconds, int | float) or not timeout_seconds > 0:
        raise refused("timeout_seconds", repr(timeout_seconds), "a number of seconds above 0")


class _Counter:
    """The effects, as the user counts them."""

    def __init__(self, effects: Callable[[], object], reset: Callable[[], object] | None) -> None:
        self._effects = effects
        self._reset = reset
        self._after = ""

    async def reset(self) -> None:
        """Forget all effects."""
        if self._reset is not None:
            await self._ask(self._reset, "reset")

    async def count(self, run: object) -> int:
        """Return how many there were in a run."""
        self._after = f" after the call, {run}"
        answer = await self._ask(self._effects, "effects")
        if not isinstance(answer, int):
            raise misuse(f"effects() must return how often the effect has happened, not {type(answer).__qualname__}")
        return answer

    async def _ask(self, function: Callable[[], object], name: str) -> object:
        try:
            answer = function()
            return await answer if inspect.isawaitable(answer) else answer
        except Exception as error:
            raise misuse(f"{name}() raised {type(error).__qualname__}{self._after}") from error


class _Trial:
    """All runs of one call.

    Attributes:
        layers: The persistence layers that it asks.
    """

    def __init__(
        self,
        call: Call,
        clock: FakeClock,
        timeout_seconds: float,
        loop: asyncio.AbstractEventLoop,
        asked_at: Line | None,
    ) -> None:
        self.layers = WatchedLayers(clock)
        self._call = call
        self._timeout_seconds = timeout_seconds
        self._loop = loop
        self._context = contextvars.copy_context()
        self._asked_at = asked_at
        self._uses_sockets = False

    async def observe(self, counter: _Counter) -> Observed:
        """Run the call undisturbed, until all layers that it asks are watched."""
        observed = await self._observe_once(counter)
        known = 0
        while known < len(self.layers):
            known = len(self.layers)
            observed = await self._observe_once(counter)
        self._uses_sockets = observed.uses_sockets
        if observed.can_differ:
            observed.keep_common(await self._observe_once(counter))
        return observed

    async def _observe_once(self, counter: _Counter) -> Observed:
        run = ObservedRun(self._call, self.layers, self._asked_at)
        await self._run(run, counter)
        return run.observed

    async def disturb(self, way: CrashWay, point: Point, counter: _Counter) -> CrashPoint:
        """Run the call, disturbed at one point; once more if it did not come there."""
        attempt = 1
        run = DisturbedRun(self._call, self.layers, way, point)
        effects = await self._run(run, counter)
        while run.missed and attempt < ATTEMPTS:
            attempt += 1
            run = DisturbedRun(self._call, self.layers, way, point)
            effects = await self._run(run, counter)
        line = point.ran_last
        return CrashPoint(
            way=way,
            where="" if line is None else line.where,
            line="" if line is None else line.source,
            when=point.when,
            effects=effects,
            outcome=run.missed or run.outcome,
            reached=not run.missed,
        )

    async def _run(self, run: ObservedRun | DisturbedRun, counter: _Counter) -> int:
        await counter.reset()
        for live in run.lives():
            await self._in_process(live, run)
        self.layers.pass_records()
        return await counter.count(run)

    async def _in_process(self, live: Callable[[ProcessLoop], None], run: ObservedRun | DisturbedRun) -> None:
        """Run a process in its thread, which is left alone if it does not come back."""
        ended: asyncio.Future[BaseException | None] = self._loop.create_future()
        process = ProcessLoop(
            timeout_seconds=self._timeout_seconds, context=self._context, uses_sockets=self._uses_sockets
        )
        thread = process.run_in_thread(live, lambda failure: self._loop.call_soon_threadsafe(ended.set_result, failure))
        try:
            while not ended.done():
                await asyncio.wait([ended], timeout=self._timeout_seconds)
                if not ended.done() and process.is_blocked():
                    frames = sys._current_frames()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
                    raise self._too_long(run, "is blocked", own_line_of_thread(frames.get(thread.ident or 0)))
        finally:
            process.give_up()
        failure = ended.result()
        if isinstance(failure, TooLong):
            raise self._too_long(run, "waits", process.main_waits_at())
        if failure is not None:
            raise failure

    def _too_long(self, run: object, what: str, line: Line | None) -> TimeoutError:
        place = "" if line is None else f"; it {what} at {line.where}: {line.source}"
        message = f"crash_everywhere: the call did not end within {self._timeout_seconds:g} s, {run}{place}"
        return TimeoutError(message)
