"""The world of the stateful tests: processes, callers, a store, and a clock that moves when it is told to.

All processes live on one event loop, which runs until nothing is left to do and then stops. Each has a front of its
own to the shared store, so they have nothing in common but that; a front can lose, hold and refuse what passes it.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import math
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from aidem import IdempotencyConfig, current_execution, idempotency, idempotent_function
from aidem._runtime.cancellation import CLEANUP_SECONDS
from aidem.exceptions import IdempotencyInDoubtError, IdempotencyPersistenceConnectionError
from aidem.testing import FakeClock
from tests.stateful.model import CallSeen, DeclinedError, Judge, RefusedError, Run, Write
from tests.stateful.process import CALL, START, Held, Process, Request, SteppedLoop

PROCESSES = 3
LEASE_SECONDS = 10.0
WAIT_SECONDS = 25.0
KEPT_SECONDS = 60.0
LONG_ENOUGH_SECONDS = WAIT_SECONDS + LEASE_SECONDS + 2.0


@dataclass(eq=False)
class Caller:
    """A call that runs as a task of a process."""

    key: str
    seen: CallSeen
    process: Process
    task: asyncio.Task[Any]
    is_judged: bool = False


def config_of(
    *, wait: bool = False, at_most_once: bool = False, renew: bool = True, validate: bool = False
) -> IdempotencyConfig:
    return IdempotencyConfig(
        event_key_jmespath="id",
        payload_validation_jmespath="amount" if validate else "",
        lease_seconds=LEASE_SECONDS,
        expires_after_seconds=KEPT_SECONDS,
        renew_lease=renew,
        wait_timeout_seconds=WAIT_SECONDS if wait else 0.0,
        on_abandoned="raise" if at_most_once else "run_again",
        stored_exceptions=(RefusedError,),
    )


@dataclass
class World:
    """Everything that happens, one step at a time; each step ends when nothing is left to do at this instant."""

    make_store: Callable[[FakeClock], Any]
    process_type: type[Process] = Process
    happened: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.clock = FakeClock(START)
        self.loop = SteppedLoop(self.clock)
        self.judge = Judge(self.clock)
        self.store = self.make_store(self.clock)
        self.processes = [self.process_type(self, settling=n % 2 == 1) for n in range(PROCESSES)]
        self.callers: list[Caller] = []
        self.held: list[Held] = []
        self._numbers = itertools.count(1)
        self._tasks: set[asyncio.Task[Any]] = set()

    def spawn(self, awaitable: Awaitable[Any]) -> asyncio.Task[Any]:
        async def run() -> Any:
            return await awaitable

        task = self.loop.create_task(run())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- Between the processes and the store ---

    async def apply(self, request: Request) -> Any:
        """Let the store do it, with a look right before and right after: it does what it is asked one by one."""
        key = request.call.key
        self.loop.selector.owed += 1
        try:
            asked = (self.store.get(key), request.ask(self.store), self.store.get(key))
            before, answer, after = [await future for future in asked]
        finally:
            self.loop.selector.owed -= 1
        owner = None if request.record is None else request.record.owner
        self.judge.saw(Write(request.operation, key, owner, answer=answer, before=before, after=after))
        return answer

    async def hold(self, request: Request | None, answer: Any) -> Any:
        held = Held(request, self.loop.create_future(), answer)
        self.held.append(held)
        await asyncio.wait([held.reply])  # who waits may be cancelled; what was sent is under way all the same
        return held.reply.result()

    # --- Steps ---

    def call(  # what a caller chooses
        self, process: int, key: str, config: IdempotencyConfig, *, amount: int = 1, block: bool = False
    ) -> Caller:
        """Start a call; it runs in the next step."""
        front = self.processes[process]
        seen = CallSeen(key=_full_key(key), amount=amount, config=config, started_at=self.clock())
        order = {"id": key, "amount": amount}
        caller = Caller(key, seen, front, self.spawn(self._call(seen, front, order, block=block)))
        self.callers.append(caller)
        return caller

    async def _call(self, seen: CallSeen, front: Process, order: Any, *, block: bool) -> Any:
        CALL.set(seen)

        async def body(order: Any) -> Any:
            return await self._body(seen, front)

        if not block:
            return await idempotent_function(
                data_keyword_argument="order", persistence_store=front, config=seen.config, key_prefix="p"
            )(body)(order)
        payload = order if seen.config.payload_validation_jmespath else ...
        async with idempotency(
            order["id"], payload=payload, persistence_store=front, config=seen.config, key_prefix="p"
        ) as execution:
            await execution.run(body, order)
        return execution.result

    async def _body(self, seen: CallSeen, front: Process) -> Any:
        record = current_execution().record
        assert record is not None
        assert record.owner is not None
        gate = self.loop.create_future()
        run = Run(number=next(self._numbers), call=seen, owner=record.owner, gate=gate)
        self.judge.body_starts(run)
        try:
            verdict = await self._verdict(run)
        except asyncio.CancelledError:
            run.ending = "cancelled"
            self.happened["cancelled in the body"] += 1
            raise
        run.ending = verdict
        self.happened[f"body {verdict}"] += 1
        if verdict == "declined":
            raise DeclinedError
        if verdict == "refused":
            raise RefusedError(run.number)
        return run.number

    async def _verdict(self, run: Run) -> str:
        while (verdict := await run.gate) == "confirmed":
            run.gate = self.loop.create_future()
            try:
                await current_execution().ensure_owned()
            except Exception:  # noqa: BLE001 - the body goes on all the same: the worst that one can do
                self.happened["body not confirmed"] += 1
            else:
                self.happened["body confirmed"] += 1
                self.judge.confirmed(run)
        return verdict

    @property
    def bodies(self) -> list[Run]:
        """The bodies that run."""
        return [run for run in self.judge.runs if run.ending == "running" and not run.gate.done()]

    @property
    def running(self) -> list[Caller]:
        """The calls that run, in processes that live."""
        return [caller for caller in self.callers if not caller.task.done() and not caller.process.is_dead]

    def process_of(self, run: Run) -> Process:
        """Return the process that runs a body."""
        return next(caller.process for caller in self.callers if caller.seen is run.call)

    def end_body(self, run: Run, verdict: str) -> None:
        run.gate.set_result(verdict)

    def cancel(self, caller: Caller) -> None:
        caller.seen.is_cancelled = True
        caller.task.cancel()

    def kill(self, process: int) -> None:
        """Kill a process, and start another in its place. What it has sent is under way all the same."""
        dead = self.processes[process]
        dead.is_dead = True
        for caller in self.callers:
            for run in caller.seen.runs if caller.process is dead else ():
                if run.ending == "running":
                    run.ending = "killed"
                    self.happened["killed in the body"] += 1
        self.processes[process] = self.process_type(self, settling=dead.settling)

    def deliver(self, held: Held) -> None:
        """Let what was held come through."""
        self.held.remove(held)
        _ = self.spawn(self._deliver(held))

    def drop(self, held: Held) -> None:
        """Let what was held be lost: whoever still waits for it gets an error."""
        self.held.remove(held)
        if not held.reply.done():
            held.reply.set_exception(IdempotencyPersistenceConnectionError("no answer came"))
            held.reply.exception()

    async def _deliver(self, held: Held) -> None:
        answer = held.answer if held.request is None else await self.apply(held.request)
        if held.reply.done():
            self.happened["delivered too late"] += 1
        else:
            held.reply.set_result(answer)

    def settle(self) -> None:
        """Run until nothing is left to do at this instant; then judge who has ended."""
        self.loop.run_forever()
        for caller in self.callers:
            if caller.task.done() and not caller.is_judged and not caller.process.is_dead:
                caller.is_judged = True
                self._judge(caller)
        assert not self.judge.broken, "\n".join(self.judge.broken)

    def _judge(self, caller: Caller) -> None:
        answer: int | BaseException
        if caller.task.cancelled():
            answer = asyncio.CancelledError()
        else:
            answer = caller.task.exception() or caller.task.result()
        self.happened["result" if isinstance(answer, int) else type(answer).__name__] += 1
        self.happened["replay"] += isinstance(answer, int | RefusedError) and not caller.seen.runs
        self.judge.answered(caller.seen, answer, faults=caller.process.faults_seen)

    def jump(self, seconds: float) -> None:
        """Stop the machine for so long: every timer comes late."""
        self.clock.advance(seconds)
        self.settle()

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with every timer in its time."""
        self.settle()
        end = self.clock() + seconds
        while (left := end - self.clock()) > 0.0005:
            timer = self.loop.selector.next_timer_seconds
            step = left if timer is None else min(left, max(timer, 0.0))
            self.clock.advance(max(0.001, math.ceil(step * 1000) / 1000))
            self.settle()

    # --- The end ---

    def finish(self) -> None:
        """Let everything come to its end; then no call may still run, and no key may be stuck."""
        self.settle()
        for process in self.processes:
            process.faults.clear()
        for held in list(self.held):
            self.deliver(held)
        self.settle()
        self.pass_time(LONG_ENOUGH_SECONDS)
        while self.bodies:
            for run in self.bodies:
                self.end_body(run, "returned")
            self.settle()
            self.pass_time(LONG_ENOUGH_SECONDS)
        assert not self.running, "calls hang"
        for key in {caller.key for caller in self.callers}:
            self._check_is_not_stuck(key)

    def _check_is_not_stuck(self, key: str) -> None:
        """A key is free, or has an outcome, or says that it is in doubt."""
        self.processes.append(Process(self, settling=False))
        probe = self.call(-1, key, config_of())
        self.settle()
        if not probe.task.done():
            [run] = probe.seen.runs
            self.end_body(run, "returned")
            self.settle()
        error = probe.task.exception()
        assert isinstance(error, RefusedError | IdempotencyInDoubtError | None), f"{key} is stuck: {error!r}"
        self.happened["in doubt at the end"] += isinstance(error, IdempotencyInDoubtError)

    def close(self) -> None:
        """End what is left of the dead, and look at how it ended, or asyncio will log that nobody did."""
        while tasks := asyncio.all_tasks(self.loop):
            for task in tasks:
                task.cancel()
            self.clock.advance(CLEANUP_SECONDS + 1.0)
            self.loop.run_forever()
        for caller in self.callers:
            _ = caller.task.cancelled() or caller.task.exception()
        self.loop.selector.owed += 1
        self.loop.run_until_complete(self.store.aclose())
        self.loop.close()


def _full_key(key: str) -> str:
    return f"p#{hashlib.sha256(json.dumps(key).encode()).hexdigest()}"
