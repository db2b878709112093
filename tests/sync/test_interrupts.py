"""Ctrl-C in a blocking call: at every moment it gives the key back, or lets the outcome be recorded."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import itertools
import json
import linecache
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Self

import pytest

from aidem import IdempotencyConfig, sync
from aidem._runtime import background_loop
from aidem._runtime.background_loop import INTERRUPTED_SECONDS, BackgroundLoop, BackgroundStep
from aidem.exceptions import IdempotencyAlreadyInProgressError
from aidem.hooks import ENDINGS, EventKind, IdempotencyEvent
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.support.planned import Listener, PlannedLayer, real_now

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 40.0
MOMENTS_PER_STAGE = 20


class InterruptingLayer(PlannedLayer):
    """Sends SIGINT to the process before or after it applies an operation, then takes its time."""

    def __init__(self, **moments: str) -> None:
        super().__init__(inner=MemoryPersistenceLayer(), clock=real_now)
        self.moments = moments
        self.interrupts = 1

    async def _do(self, operation: str, apply: Any) -> Any:
        moment = self.moments.pop(operation, None)
        if moment == "before":
            await self.interrupt()
        answer = await super()._do(operation, apply)
        if moment == "after":
            await self.interrupt()
        return answer

    async def interrupt(self) -> None:
        for _ in range(self.interrupts):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.1)


@pytest.fixture(autouse=True)
def _fresh_loop() -> Iterator[None]:
    sync.close()
    yield
    sync.close()


Charge = Callable[..., str]


def by_decorator(layer: PlannedLayer, body: Callable[[], str], **options: Any) -> str:
    return sync.idempotent_function(persistence_store=layer, key_prefix="charge", **options)(body)()


def by_block(layer: PlannedLayer, body: Callable[[], str], **options: Any) -> str:
    with sync.idempotency("charge", persistence_store=layer, **options) as execution:
        return execution.run(body)


def by_block_step_by_step(layer: PlannedLayer, body: Callable[[], str], **options: Any) -> str:
    with sync.idempotency("charge", persistence_store=layer, **options) as execution:
        if not execution.replayed:
            execution.result = body()
    result: str = execution.result
    return result


@pytest.fixture(params=[by_decorator, by_block, by_block_step_by_step])
def charge(request: pytest.FixtureRequest) -> Charge:
    function: Charge = request.param
    return function


def first() -> str:
    return "first"


def second() -> str:
    return "second"


def fails() -> str:
    raise ValueError("no money")


def test_an_interrupt_before_the_background_loop_has_begun_to_complete_lets_the_outcome_be_recorded(
    charge: Charge,
) -> None:
    layer = PlannedLayer(inner=MemoryPersistenceLayer(), clock=real_now)
    was_asked: list[str] = []

    def first_while_the_loop_is_held() -> str:
        loop: Any = background_loop._process.loop
        loop.call(lambda: hold(loop._loop))
        return first()

    def hold(loop: Any) -> None:
        for asked in ("_begin", "_cancel"):
            while asked not in {handle._callback.__name__ for handle in list(loop._ready)}:
                time.sleep(0.001)
            was_asked.append(asked)
            if asked == "_begin":
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        charge(layer, first_while_the_loop_is_held)
    assert was_asked == ["_begin", "_cancel"]
    assert layer.calls == ["acquire", "complete"]
    assert charge(layer, second) == "first"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_the_claim_is_asked_for_leaves_no_claim(charge: Charge, moment: str) -> None:
    layer = InterruptingLayer(acquire=moment)
    with pytest.raises(KeyboardInterrupt):
        charge(layer, first)
    assert layer.calls == ["acquire", "release"]
    assert charge(layer, second) == "second"


def test_an_interrupt_in_the_body_gives_the_key_back(charge: Charge) -> None:
    def interrupted() -> str:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(PATIENCE_SECONDS)
        raise AssertionError("not to be reached")

    layer = InterruptingLayer()
    with pytest.raises(KeyboardInterrupt):
        charge(layer, interrupted)
    assert layer.calls == ["acquire", "release"]
    assert charge(layer, second) == "second"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_the_outcome_is_recorded_lets_it_be_recorded(charge: Charge, moment: str) -> None:
    layer = InterruptingLayer(complete=moment)
    with pytest.raises(KeyboardInterrupt):
        charge(layer, first)
    assert layer.calls == ["acquire", "complete"]
    assert charge(layer, second) == "first"


@pytest.mark.parametrize("moment", ["before", "after"])
def test_an_interrupt_while_the_key_is_given_back_does_not_stop_that(charge: Charge, moment: str) -> None:
    layer = InterruptingLayer(release=moment)
    with pytest.raises(KeyboardInterrupt) as caught:
        charge(layer, fails)
    assert isinstance(caught.value.__context__, ValueError)
    assert charge(layer, second) == "second"


def test_another_interrupt_does_not_cut_the_clean_up_short(charge: Charge) -> None:
    layer = InterruptingLayer(acquire="after")
    layer.interrupts = 4
    with pytest.raises(KeyboardInterrupt):
        charge(layer, first)
    assert layer.calls == ["acquire", "release"]
    assert charge(layer, second) == "second"


def test_an_interrupt_while_waiting_in_line_leaves_the_others_claim_alone(charge: Charge) -> None:
    layer = InterruptingLayer()
    gate = threading.Event()
    started = threading.Event()

    def waits() -> str:
        started.set()
        assert gate.wait(PATIENCE_SECONDS)
        return "first"

    results: list[str] = []
    thread = threading.Thread(target=lambda: results.append(charge(layer, waits)))
    thread.start()
    assert started.wait(PATIENCE_SECONDS)
    timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
    patient = IdempotencyConfig(wait_timeout_seconds=PATIENCE_SECONDS)
    key_prefix = "charge" if charge is by_decorator else "aidem"
    with pytest.raises(KeyboardInterrupt):
        timer.start()
        if charge is by_decorator:
            sync.idempotent_function(persistence_store=layer, config=patient, key_prefix=key_prefix)(second)()
        else:
            sync.idempotency("charge", persistence_store=layer, config=patient).__enter__()
    with pytest.raises(IdempotencyAlreadyInProgressError):
        charge(layer, second)
    gate.set()
    thread.join(PATIENCE_SECONDS)
    assert results == ["first"]
    assert charge(layer, second) == "first"


def test_a_store_that_never_answers_holds_an_interrupt_up_for_a_few_seconds_only() -> None:
    class SilentLayer(InterruptingLayer):
        async def interrupt(self) -> None:
            await super().interrupt()
            await asyncio.sleep(3600)

    started_at = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        by_decorator(SilentLayer(acquire="before"), first)
    assert time.monotonic() - started_at < PATIENCE_SECONDS


def test_an_async_response_hook_is_cancelled_by_an_interrupt() -> None:
    ended: list[str] = []

    async def hook(response: Any, record: Any) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(3600)
        finally:
            ended.append("hook")

    layer = InterruptingLayer()
    charge = sync.idempotent_function(persistence_store=layer, config=IdempotencyConfig(response_hook=hook))(first)
    charge()
    with pytest.raises(KeyboardInterrupt):
        charge()
    assert ended == ["hook"]


# --- An interrupt between two lines of ours ---------------------------------------------------------------------------


OURS = {
    str(ROOT / "aidem" / name)
    for name in ("sync/__init__.py", "sync/_blocking.py", "_runtime/background_loop.py", "_api/block.py")
}


class InterruptAt:
    """Raises KeyboardInterrupt in this thread when the code of the blocking front comes to its n-th event."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.passed = 0
        self.place = ""
        self._entered: set[int] = set()

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: FrameType, event: str, _argument: object) -> Any:
        if frame.f_code.co_filename not in OURS or frame.f_code.co_name == "__del__":
            return None
        # Leaving such a block is one step to the interpreter, which looks for signals before and after it.
        if frame.f_lineno in self._entered and event == "line":
            return self._trace
        if event in {"call", "line"}:
            self.passed += 1
            if "with _process.lock" in linecache.getline(frame.f_code.co_filename, frame.f_lineno):
                self._entered.add(frame.f_lineno)
            if self.passed == self.number:
                self.place = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {event}"
                raise KeyboardInterrupt
        return self._trace


@pytest.mark.parametrize("body", [first, fails])
def test_an_interrupt_at_any_line_leaves_no_key_stuck(charge: Charge, body: Callable[[], str]) -> None:
    places: list[str] = []
    stuck: list[str] = []
    for number in itertools.count(1):
        layer = PlannedLayer(inner=MemoryPersistenceLayer(), clock=real_now)
        with InterruptAt(number) as interrupt, contextlib.suppress(ValueError, KeyboardInterrupt):
            # An interrupt may strike before the execution is no longer the current one: that ends with this context.
            contextvars.copy_context().run(charge, layer, body)
        if not interrupt.place:
            break
        places.append(interrupt.place)
        try:
            assert charge(layer, second) in {"first", "second"}
        except IdempotencyAlreadyInProgressError:
            stuck.append(interrupt.place)
    assert len(places) > 40
    assert stuck == []


def is_balanced(events: list[IdempotencyEvent]) -> bool:
    """Whether there is a claim and then its ending, or neither; what releases a claim in the background gets time."""
    deadline = time.monotonic() + PATIENCE_SECONDS / 2
    while True:
        kinds = [event.kind for event in events if event.kind is EventKind.CLAIMED or event.kind in ENDINGS]
        if kinds == [] or (kinds[0] is EventKind.CLAIMED and len(kinds) == 2):
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.001)


@pytest.mark.parametrize("body", [first, fails])
def test_an_interrupt_at_any_line_leaves_no_claim_without_its_ending(charge: Charge, body: Callable[[], str]) -> None:
    unbalanced: list[tuple[str, list[str]]] = []
    charge(PlannedLayer(inner=MemoryPersistenceLayer(), clock=real_now), first)  # starts the background loop
    for number in itertools.count(1):
        layer, listener = PlannedLayer(inner=MemoryPersistenceLayer(), clock=real_now), Listener()
        config = IdempotencyConfig(hooks=(listener,))
        with InterruptAt(number) as interrupt, contextlib.suppress(ValueError, KeyboardInterrupt):
            contextvars.copy_context().run(partial(charge, layer, body, config=config))
        if not is_balanced(listener.events):
            unbalanced.append((interrupt.place, [*map(str, listener.kinds)]))
        if not interrupt.place:
            break
    assert number > 40
    assert unbalanced == []


class InterruptedLoop(BackgroundLoop):
    """A loop in whose thread-safe entry Ctrl-C strikes, before or after the request is in."""

    def __init__(self, *, has_asked: bool) -> None:
        super().__init__()
        self.has_asked = has_asked
        self.is_interrupting = True

    def call(self, callback: Callable[[], object]) -> bool:
        if self.is_interrupting:
            self.is_interrupting = False
            if self.has_asked:
                super().call(callback)
            raise KeyboardInterrupt
        return super().call(callback)


@pytest.mark.parametrize("has_asked", [False, True])
def test_a_step_is_abandoned_wherever_its_submission_was_interrupted(has_asked: bool) -> None:
    cancelled: list[bool] = []

    async def wait() -> None:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    loop = InterruptedLoop(has_asked=has_asked)
    loop.start()
    step = BackgroundStep(wait)
    with pytest.raises(KeyboardInterrupt):
        step.submit_to(loop)
    started_at = time.monotonic()
    step.abandon()
    assert time.monotonic() - started_at < INTERRUPTED_SECONDS, "it did not end, it was given up"
    assert cancelled in ([], [True] * has_asked)
    loop.end()
    loop.join()
    assert not loop.is_alive()


def test_a_step_that_no_loop_was_asked_for_is_abandoned_at_once() -> None:
    async def never() -> None:
        raise AssertionError("not to be run")

    BackgroundStep(never).abandon()
    loop = BackgroundLoop()
    loop.start()
    loop.end()
    loop.join()
    step = BackgroundStep(never)
    step.submit_to(loop)  # it is closed
    step.abandon()


# --- An interrupt while the background loop is started ----------------------------------------------------------------


def interrupt_start(monkeypatch: pytest.MonkeyPatch, *, start: Callable[[threading.Thread], object]) -> None:
    """Let Ctrl-C strike the next thread that is started, after `start` was called with it."""
    original = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        monkeypatch.setattr(threading.Thread, "start", original)
        start(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)


@pytest.mark.parametrize("start", [lambda thread: None, threading.Thread.start], ids=["before", "after"])
def test_an_interrupt_while_the_background_loop_is_started_does_not_keep_it_from_being_closed(
    charge: Charge, start: Callable[[threading.Thread], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, threads = PlannedLayer(inner=MemoryPersistenceLayer(), clock=real_now), threading.enumerate()
    interrupt_start(monkeypatch, start=start)
    with pytest.raises(KeyboardInterrupt):
        charge(layer, first)
    sync.close()
    assert layer.calls == []
    assert charge(layer, second) == "second"
    sync.close()
    for thread in {*threading.enumerate()} - {*threads}:
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def test_the_thread_of_a_loop_whose_start_was_interrupted_ends_if_it_serves_it_already(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, serves = BackgroundLoop(), threading.Event()

    def start(thread: threading.Thread) -> None:
        thread.start()
        assert loop.call(serves.set)
        assert serves.wait(PATIENCE_SECONDS)

    interrupt_start(monkeypatch, start=start)
    with pytest.raises(KeyboardInterrupt):
        loop.start()
    loop.join()
    assert not loop.is_alive()
    assert not loop.call(serves.set), "it is closed"


def test_the_thread_of_a_loop_whose_start_was_interrupted_ends_if_it_begins_only_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loop, late = BackgroundLoop(), list[threading.Thread]()
    interrupt_start(monkeypatch, start=late.append)
    with pytest.raises(KeyboardInterrupt):
        loop.start()
    assert not loop.call(late.clear), "it is closed"
    [thread] = late
    thread.start()
    thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


# --- Real signals at many moments -------------------------------------------------------------------------------------


class Worker:
    """A process that calls and calls; every call is interrupted once, at a moment that this process chooses."""

    def __init__(self, *options: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-m", "tests.support.sync_interrupted", *options],
            cwd=ROOT,
            # Not measured: an interrupt within coverage's own lock would leave it held for ever.
            env={name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def interrupt_one_call(self, delay_seconds: float) -> dict[str, Any]:
        """Return what happened, as the process tells it."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        assert self._next_line() == "going\n"
        time.sleep(delay_seconds)
        self._process.send_signal(signal.SIGINT)
        report: dict[str, Any] = json.loads(self._next_line())
        return report

    def _next_line(self) -> str:
        """Wait for the next line; a process that hangs shows its stacks on stderr."""
        assert self._process.stdout is not None
        timer = threading.Timer(PATIENCE_SECONDS / 2, self._process.send_signal, (signal.SIGABRT,))
        timer.start()
        try:
            return self._process.stdout.readline()
        finally:
            timer.cancel()

    def close(self) -> int:
        assert self._process.stdin is not None
        self._process.stdin.close()
        return self._process.wait(PATIENCE_SECONDS)

    def kill(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def interrupt_everywhere(worker: Worker) -> tuple[Counter[str], list[dict[str, Any]]]:
    """Interrupt calls until every stage was struck often enough; return the stages, and what went wrong."""
    chance = random.Random(7)
    longest = 0.035
    stages: Counter[str] = Counter()
    broken: list[dict[str, Any]] = []
    deadline = time.monotonic() + 3 * PATIENCE_SECONDS
    while any(stages[stage] < MOMENTS_PER_STAGE for stage in ("claim", "body", "complete")):
        assert time.monotonic() < deadline, f"not every stage was struck: {stages}"
        report = worker.interrupt_one_call(chance.uniform(0.0, longest))
        stages[report["stage"]] += 1
        longest *= 0.9 if report["stage"] == "after" else 1.02  # as long as a call takes, which depends on the machine
        if report["again"] != report["expected"]:
            broken.append(report)
            break
    return stages, broken


@pytest.mark.timeout(180)
@pytest.mark.parametrize("front", ["decorator", "block"])
def test_signals_at_many_moments_never_leave_a_key_stuck_nor_falsely_completed(front: str) -> None:
    worker = Worker(front)
    try:
        stages, broken = interrupt_everywhere(worker)
        assert broken == []
        assert stages.total() >= 60
        assert worker.close() == 0
    finally:
        worker.kill()


@pytest.mark.timeout(180)
@pytest.mark.parametrize("control", ["keeps-claims", "completes-early"])
def test_the_harness_finds_calls_that_keep_or_complete_what_was_interrupted(control: str) -> None:
    worker = Worker("decorator", control)
    try:
        _, broken = interrupt_everywhere(worker)
        assert len(broken) == 1
    finally:
        worker.kill()
