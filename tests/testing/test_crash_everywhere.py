"""`crash_everywhere` finds what is wrong with a handler, at its line, and nothing where nothing is."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import json
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import anyio
import httpx
import pytest
import uvloop
from fastapi import FastAPI

from aidem import IdempotencyConfig, current_execution, idempotency, idempotent, idempotent_function, sync
from aidem.awslambda import lambda_handler
from aidem.exceptions import IdempotencyConfigError, IdempotencyInDoubtError, IdempotencyUsageError
from aidem.fastapi import IdempotentRoute, by_header
from aidem.persistence import Immediate
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from aidem.testing import CrashPoint, CrashReport, CrashWay, FakeClock, crash_everywhere

F = TypeVar("F", bound=Callable[..., Any])
WAYS: tuple[CrashWay, ...] = ("vanish", "cancel", "lost_request", "lost_reply", "second_caller")


class Bank:
    """What handlers have an effect on.

    Attributes:
        charges: What it was asked, in order.
    """

    def __init__(self) -> None:
        self.charges: list[str] = []

    def charge(self, reference: str) -> None:
        self.charges.append(reference)

    def count(self) -> int:
        return len(self.charges)

    def count_once(self) -> int:
        """Count as a bank does that knows its references."""
        return len(set(self.charges))


class Case:
    """A handler with what it needs to be proved."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.layer = MemoryPersistenceLayer(clock=self.clock)
        self.bank = Bank()

    def idempotent(self, **config: Any) -> Callable[[F], F]:
        decorated: Any = idempotent_function(
            key_prefix="case", persistence_store=self.layer, config=IdempotencyConfig(**config)
        )
        return decorated

    async def prove(self, call: Callable[[], Awaitable[object]], **options: Any) -> CrashReport:
        options = {"effects": self.bank.count, "reset": self.bank.charges.clear} | options
        return await crash_everywhere(call, clock=self.clock, **options)


@pytest.fixture
def case() -> Case:
    return Case()


def wrong(report: CrashReport) -> set[tuple[str, str]]:
    """Return the ways and lines in which the effect happened twice; where it did not happen once is an error."""
    assert [point for point in report.points if not point.reached] == []
    assert {point.effects for point in report.points} <= {1, 2}
    return {(point.way, point.line) for point in report.points if point.effects == 2}


# --- What is found ----------------------------------------------------------------------------------------------------


async def test_an_effect_without_a_key_happens_twice_where_the_process_dies_before_its_completion(case: Case) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> str:
        await asyncio.sleep(0.01)
        case.bank.charge(order_id)
        return "receipt"

    report = await case.prove(lambda: charge("o-1"))
    assert wrong(report) == {("vanish", 'return "receipt"')}
    [line] = {point.where for point in report.points if point.effects == 2}
    assert line == f"tests/testing/test_crash_everywhere.py:{charge.__wrapped__.__code__.co_firstlineno + 4}"  # type: ignore[attr-defined]
    assert {point.when for point in report.points if point.effects == 2} == {"before complete is applied"}
    with pytest.raises(AssertionError, match=r"1 of \d+ runs are wrong: the effect must happen 1 times") as table:
        report.check()
    assert 'return "receipt"  before complete is applied  returned' in str(table.value)
    report.check(at_most=2)


async def test_nothing_is_found_where_the_effect_has_a_key(case: Case) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None:
        await asyncio.sleep(0)
        case.bank.charge(current_execution().key_for("bank"))
        await asyncio.sleep(0)

    report = await case.prove(lambda: charge("o-1"), effects=case.bank.count_once)
    report.check()
    assert {point.way for point in report.points} == set(WAYS)
    assert {point.outcome for point in report.points} == {"returned"}


async def test_at_most_once_is_in_doubt_wherever_the_process_dies_or_the_call_is_cancelled_in_its_body(
    case: Case,
) -> None:
    @case.idempotent(on_abandoned="raise")
    async def charge(order_id: str) -> None:
        await asyncio.sleep(0)
        case.bank.charge(order_id)
        await asyncio.sleep(0)

    report = await case.prove(lambda: charge("o-1"))
    report.check(at_least=0)
    in_doubt = f"raised {IdempotencyInDoubtError.__name__}"
    assert {(point.way, point.line) for point in report.points if point.outcome == in_doubt} >= {
        ("vanish", "await asyncio.sleep(0)"),
        ("cancel", "await asyncio.sleep(0)"),
    }
    with pytest.raises(AssertionError, match="must happen 1 times"):
        report.check()


async def test_a_function_that_is_not_idempotent_is_wrong_in_every_way_that_it_can_be_disturbed(case: Case) -> None:
    async def charge(order_id: str) -> None:
        case.bank.charge(order_id)
        await asyncio.sleep(0)

    report = await case.prove(lambda: charge("o-1"))
    line = "await asyncio.sleep(0)"
    assert [(point.way, point.line, point.when, point.effects) for point in report.points] == [
        ("vanish", line, "", 2),
        ("vanish", line, "after the call", 2),
        ("cancel", line, "", 2),
        ("second_caller", line, "", 3),  # and once more when it is called again
    ]


# --- Handlers that are wrong on purpose -------------------------------------------------------------------------------


async def test_an_effect_before_the_claim(case: Case) -> None:
    @case.idempotent()
    async def record(order_id: str) -> None:
        await asyncio.sleep(0)

    async def charge(order_id: str) -> None:
        case.bank.charge(order_id)  # wrong: nobody holds a claim
        await record(order_id)

    report = await case.prove(lambda: charge("o-1"))
    assert {(point.way, point.line) for point in report.points if point.effects == 1} == set()
    assert ("vanish", "await record(order_id)") in {(point.way, point.line) for point in report.points}


async def test_an_effect_that_is_retried(case: Case) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None:
        for _ in range(2):
            try:
                async with asyncio.timeout(1):
                    case.bank.charge(order_id)
                    await asyncio.sleep(0)
                return
            except asyncio.CancelledError:  # wrong: the bank may have the first charge
                continue

    report = await case.prove(lambda: charge("o-1"), ways=["cancel"])
    assert wrong(report) == {("cancel", "await asyncio.sleep(0)")}


async def test_an_effect_in_a_finally(case: Case) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None:
        try:
            await asyncio.sleep(0)
        finally:
            case.bank.charge(order_id)  # wrong: a cancelled call has charged, and gives its key back

    report = await case.prove(lambda: charge("o-1"), ways=["cancel"])
    assert wrong(report) == {("cancel", "await asyncio.sleep(0)")}


async def test_a_second_caller_with_another_key(case: Case) -> None:
    calls: Iterator[int] = iter(range(10**6))

    @case.idempotent()
    async def charge(order_id: str, attempt: int) -> None:
        case.bank.charge(order_id)
        await asyncio.sleep(0)

    report = await case.prove(lambda: charge("o-1", next(calls)), ways=["second_caller"])
    assert {point.effects for point in report.points} == {3}  # wrong: each caller has a key of its own
    assert "await asyncio.sleep(0)" in {point.line for point in report.points}


async def test_a_completion_that_comes_before_its_effect(case: Case) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None:
        async def later() -> None:
            await asyncio.sleep(5)
            case.bank.charge(order_id)

        background.append(asyncio.create_task(later()))  # wrong: the effect is lost if the process dies meanwhile

    background: list[asyncio.Task[None]] = []
    report = await case.prove(lambda: charge("o-1"), ways=["vanish"])
    lost = {(point.line, point.when) for point in report.points if point.effects == 0}
    assert ("await asyncio.sleep(5)", "after the call") in lost
    with pytest.raises(AssertionError):
        report.check(at_most=2)


async def test_an_effect_after_a_cancellation_that_is_swallowed(case: Case) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None:
        case.bank.charge(order_id)
        with contextlib.suppress(asyncio.CancelledError):  # wrong, if the caller charges once more when it is told so
            await asyncio.sleep(0)
        case.bank.charge(order_id)

    report = await case.prove(lambda: charge("o-1"))
    assert {point.effects for point in report.points if point.way == "cancel"} == {2}


# --- The ways ---------------------------------------------------------------------------------------------------------


async def test_what_vanishes_runs_nothing_any_more(case: Case) -> None:
    ran: list[str] = []

    class Resource:
        def __init__(self, name: str) -> None:
            self.name = name

        def __del__(self) -> None:
            ran.append(f"finalizer of {self.name}")

    async def numbers() -> AsyncGenerator[int]:
        try:
            yield 1
            await asyncio.sleep(0)
            yield 2
        finally:
            ran.append("generator")

    async def child() -> None:
        resource = Resource("child")
        try:
            await asyncio.sleep(30)
        finally:
            ran.append("child")
            del resource

    @case.idempotent()
    async def charge(order_id: str) -> None:
        resource = Resource("call")
        generator = numbers()
        async with asyncio.TaskGroup() as group, contextlib.aclosing(generator):
            group.create_task(child())
            await anext(generator)
            await anext(generator)
            ran.append("body")
        del resource

    of_runs: list[list[str]] = []

    def count() -> int:
        of_runs.append(sorted(ran))
        ran.clear()
        return 1

    report = await case.prove(lambda: charge("o-1"), effects=count, ways=["vanish"])
    report.check()
    once = ["body", "child", "finalizer of call", "finalizer of child", "generator"]
    assert of_runs[0] == once
    lines = [point.line for point in report.points if not point.when]
    assert {"await asyncio.sleep(0)", "await asyncio.sleep(30)"} <= set(lines)
    asleep = [index for index, point in enumerate(report.points, -len(report.points)) if "sleep" in point.line]
    assert [of_runs[index] for index in asleep] == [once] * len(asleep)  # by the second process


def run_file(path: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    path.write_text(code)
    command = [sys.executable, *options, "-W", "error", str(path)]
    # Measuring coverage there, too, would take long.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, env=environment)


@pytest.mark.parametrize("options", [(), ("-X", "dev")], ids=["plain", "dev"])
def test_what_has_vanished_is_not_closed_at_the_end_of_the_interpreter_either(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    code = """
import asyncio
from aidem.testing import FakeClock, crash_everywhere

class Resource:
    def __del__(self):
        print("finalizer")

vanished = []

async def generate():
    try:
        yield 1
    finally:
        print("generator")

async def charge():
    resource = Resource()
    generator = generate()
    async for _ in generator:
        try:
            asyncio.create_task(asyncio.sleep(3600))
            await asyncio.sleep(0)
            vanished.append(0)
            await asyncio.Event().wait()
        finally:
            print("finally")

async def main():
    asyncio.get_running_loop().slow_callback_duration = 60
    try:
        await crash_everywhere(charge, clock=FakeClock(), effects=int, timeout_seconds=1)
    except TimeoutError as error:
        print("waits" in str(error))

asyncio.run(main())
"""
    done = run_file(tmp_path / "charge.py", code, *options)
    assert (done.stdout, done.stderr, done.returncode) == ("True\n", "", 0)


@pytest.mark.timeout(150)
def test_a_thousand_vanished_runs_leave_nothing_behind(tmp_path: Path) -> None:
    code = """
import asyncio, gc, os, sys, threading
from aidem import idempotent_function
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import FakeClock, crash_everywhere

clock = FakeClock()
descriptors = lambda: len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

@idempotent_function(persistence_store=MemoryPersistenceLayer(clock=clock))
async def charge(order_id):
    async with asyncio.TaskGroup() as group:
        group.create_task(asyncio.sleep(0.1))
        for _ in range(50):
            await asyncio.sleep(0)

async def main():
    runs = 0
    before = descriptors()
    while runs < 1000:
        report = await crash_everywhere(lambda: charge("o-1"), clock=clock, effects=int, ways=["vanish"])
        runs += sum(point.outcome == "returned" and point.reached for point in report.points)
    gc.collect()
    for thread in threading.enumerate():
        if thread.name == "crash_everywhere":
            thread.join()
    print(len(asyncio.all_tasks()), threading.active_count(), descriptors() - before)

asyncio.run(main())
"""
    done = run_file(tmp_path / "charge.py", code)
    assert (done.stdout, done.stderr, done.returncode) == ("1 1 0\n", "", 0)


async def test_a_cancelled_call_cleans_up_and_its_process_goes_on(case: Case) -> None:
    cleaned: list[str] = []
    loops: set[asyncio.AbstractEventLoop] = set()

    @case.idempotent()
    async def charge(order_id: str) -> None:
        loops.add(asyncio.get_running_loop())
        try:
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            cleaned.append(order_id)
            raise
        case.bank.charge(order_id)

    report = await case.prove(lambda: charge("o-1"), ways=["cancel"])
    report.check()
    assert cleaned == ["o-1"]
    assert len(loops) == 2 + len(report.points)  # two of calls that were not disturbed


async def test_each_operation_is_lost_once_before_it_is_applied_and_once_after(case: Case) -> None:
    applied: list[str] = []

    class Layer(MemoryPersistenceLayer):
        def acquire(self, *args: Any, **options: Any) -> Immediate[Any]:
            applied.append("acquire")
            return super().acquire(*args, **options)

        def complete(self, *args: Any, **options: Any) -> Immediate[Any]:
            applied.append("complete")
            return super().complete(*args, **options)

        def release(self, *args: Any, **options: Any) -> Immediate[Any]:
            applied.append("release")
            return super().release(*args, **options)

    @idempotent_function(key_prefix="case", persistence_store=Layer(clock=case.clock))
    async def charge(order_id: str) -> None:
        case.bank.charge(order_id)

    of_runs: list[list[str]] = []

    def count() -> int:
        of_runs.append([*applied])
        applied.clear()
        return case.bank.count()

    ways: list[CrashWay] = ["lost_request", "lost_reply"]
    report = await case.prove(lambda: charge("o-1"), effects=count, ways=ways)
    report.check()
    assert [(point.way, point.when) for point in report.points] == [
        ("lost_request", "acquire"),
        ("lost_request", "complete"),
        ("lost_reply", "acquire"),
        ("lost_reply", "complete"),
    ]
    assert of_runs[-4:] == [
        ["release", "acquire", "complete"],  # the call fails, and is made again
        ["acquire", "complete", "acquire"],  # its second try; then the call is made again, and replays
        ["acquire", "release", "acquire", "complete"],
        ["acquire", "complete", "complete", "acquire"],
    ]


async def test_a_second_caller_runs_at_the_same_time_in_the_same_process(case: Case) -> None:
    running = 0
    together: list[int] = []

    async def charge() -> None:
        nonlocal running
        running += 1
        await asyncio.sleep(1)
        together.append(running)
        running -= 1

    def count() -> int:
        at_once, together[:] = max(together), []
        return at_once

    report = await case.prove(charge, effects=count, ways=["second_caller"])
    assert [point.effects for point in report.points] == [2]


async def test_a_second_caller_is_refused_or_waits_and_the_effect_happens_once(case: Case) -> None:
    for seconds in (0.0, 10.0):

        @case.idempotent(wait_timeout_seconds=seconds)
        async def charge(order_id: str) -> None:
            await asyncio.sleep(1)
            case.bank.charge(order_id)
            await asyncio.sleep(1)

        report = await case.prove(lambda: charge("o-1"), ways=["second_caller"])
        report.check()


async def test_a_call_that_never_waits_vanishes_once_before_and_after_its_effect(case: Case) -> None:
    async def charge() -> None:
        case.bank.charge("o-1")

    report = await case.prove(charge, ways=["vanish"])
    assert [(point.when, point.effects) for point in report.points] == [("after the call", 2)]


async def test_fifty_suspensions_take_no_time_however_long_they_sleep(case: Case) -> None:
    @case.idempotent(lease_seconds=10**6)
    async def charge(order_id: str) -> None:
        for _ in range(50):
            await asyncio.sleep(3600)
        case.bank.charge(current_execution().key_for("bank"))

    report = await case.prove(lambda: charge("o-1"), effects=case.bank.count_once)
    report.check()
    for way in ("vanish", "cancel", "second_caller"):
        slept = [point for point in report.points if point.way == way and point.line == "await asyncio.sleep(3600)"]
        assert len([point for point in slept if not point.when]) == 50


async def test_each_run_has_the_context_of_the_test_and_changes_none(case: Case) -> None:
    variable = contextvars.ContextVar("variable", default="unset")
    variable.set("of the test")
    seen: set[str] = set()

    async def charge() -> None:
        seen.add(variable.get())
        variable.set("of a run")
        await asyncio.sleep(0)

    await case.prove(charge)
    assert seen == {"of the test"}
    assert variable.get() == "of the test"


async def test_reset_and_effects_may_be_async_and_run_on_the_loop_of_the_test(case: Case) -> None:
    loops: set[asyncio.AbstractEventLoop] = set()

    async def reset() -> None:
        loops.add(asyncio.get_running_loop())
        case.bank.charges.clear()

    async def count() -> int:
        loops.add(asyncio.get_running_loop())
        return case.bank.count()

    @case.idempotent()
    async def charge(order_id: str) -> None:
        case.bank.charge(order_id)

    report = await case.prove(lambda: charge("o-1"), ways=["lost_reply"], reset=reset, effects=count)
    report.check()
    assert loops == {asyncio.get_running_loop()}


async def test_without_reset_the_effects_add_up(case: Case) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None:
        case.bank.charge(order_id)

    report = await case.prove(lambda: charge("o-1"), reset=None, ways=["lost_reply"])
    assert [point.effects for point in report.points] == [3, 4]  # two calls were not disturbed


@pytest.mark.parametrize("code", [0, KeyboardInterrupt, SystemExit])
async def test_a_call_that_ends_its_process_is_a_call_that_raises(case: Case, code: Any) -> None:
    async def charge() -> None:
        case.bank.charge("o-1")
        if code:
            raise code
        sys.exit(code)

    report = await case.prove(charge, ways=["vanish"])
    assert [point.outcome for point in report.points] == [f"raised {getattr(code, '__name__', 'SystemExit')}"]


# --- What is called ---------------------------------------------------------------------------------------------------


async def test_a_block(case: Case) -> None:
    async def charge(order_id: str) -> None:
        async with idempotency(order_id, persistence_store=case.layer) as execution:
            if not execution.replayed:
                await asyncio.sleep(0)
                case.bank.charge(order_id)
                execution.result = "charged"

    report = await case.prove(lambda: charge("o-1"))
    assert {way for way, _ in wrong(report)} == {"vanish"}
    assert {point.when for point in report.points if point.effects == 2} == {"before complete is applied"}


async def test_a_lambda_handler(case: Case) -> None:
    class Context:
        def get_remaining_time_in_millis(self) -> int:
            return 120_000

    @lambda_handler
    @idempotent(persistence_store=case.layer, key_prefix="handler")
    async def handler(event: dict[str, str], context: Context) -> dict[str, int]:
        await asyncio.sleep(0)
        case.bank.charge(event["id"])
        return {"statusCode": 200}

    call: Any = handler.__wrapped__  # type: ignore[attr-defined]
    report = await case.prove(lambda: call({"id": "o-1"}, Context()))
    assert wrong(report) == {("vanish", 'return {"statusCode": 200}')}


@pytest.mark.parametrize("is_async", [True, False], ids=["async", "thread"])
async def test_a_fastapi_app(case: Case, *, is_async: bool) -> None:
    app = FastAPI()
    app.router.route_class = IdempotentRoute.configure(
        key_prefix="payments", scope=by_header("authorization"), persistence_store=case.layer
    )

    def charge_at_once() -> dict[str, str]:
        time.sleep(0.001)
        case.bank.charge("o-1")
        return {"status": "charged"}

    async def charge() -> dict[str, str]:
        await asyncio.sleep(0)
        return charge_at_once()

    app.post("/payments")(charge if is_async else charge_at_once)

    async def post() -> None:
        transport = httpx.ASGITransport(app=app)
        headers = {"authorization": "ann", "idempotency-key": '"k-1"'}
        async with httpx.AsyncClient(transport=transport, base_url="http://test", headers=headers) as client:
            (await client.post("/payments")).raise_for_status()

    report = await case.prove(post)
    assert {way for way, _ in wrong(report)} == {"vanish"} if is_async else {"vanish", "cancel"}
    assert {point.outcome for point in report.points} == {"returned"}


async def test_a_line_within_async_generators_and_other_awaitables_is_found(case: Case) -> None:
    class Wait:
        def __await__(self) -> Generator[Any, Any, None]:
            yield from asyncio.sleep(0.5).__await__()

    async def lines() -> AsyncIterator[int]:
        await asyncio.sleep(0.1)
        yield 1
        await Wait()

    @contextlib.asynccontextmanager
    async def opened() -> AsyncIterator[None]:
        await asyncio.sleep(0.2)
        yield
        await asyncio.sleep(0.3)

    @types.coroutine
    def old() -> Any:
        yield from asyncio.sleep(0.4).__await__()

    async def charge() -> None:
        async for _ in lines():
            pass
        async with opened():
            pass
        await old()

    report = await case.prove(charge, ways=["cancel"])
    assert [point.line for point in report.points] == [
        "await asyncio.sleep(0.1)",
        "yield from asyncio.sleep(0.5).__await__()",
        "await asyncio.sleep(0.2)",
        "await asyncio.sleep(0.3)",
        "yield from asyncio.sleep(0.4).__await__()",
    ]


@pytest.mark.parametrize("run", [asyncio.to_thread, anyio.to_thread.run_sync], ids=["asyncio", "anyio"])
async def test_a_thread_that_the_call_waits_for_ends_before_its_process_vanishes(case: Case, run: Any) -> None:
    threads: list[threading.Thread] = []

    def in_thread() -> None:
        threads.append(threading.current_thread())
        time.sleep(0.01)
        case.bank.charge("o-1")

    @case.idempotent()
    async def charge(order_id: str) -> None:
        await run(in_thread)
        await run(int)

    report = await case.prove(lambda: charge("o-1"))
    assert {way for way, _ in wrong(report)} == {"vanish", "cancel"}
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


async def test_a_thread_that_waits_for_the_loop_is_not_waited_for_long(case: Case) -> None:
    async def answer() -> None:
        await asyncio.sleep(0)

    async def charge() -> None:
        loop = asyncio.get_running_loop()
        await asyncio.to_thread(lambda: asyncio.run_coroutine_threadsafe(answer(), loop).result(5))
        case.bank.charge("o-1")

    report = await case.prove(charge, ways=["cancel"])
    assert "await asyncio.sleep(0)" in {point.line for point in report.points}


async def test_threads_of_another_pool_are_waited_for_too(case: Case) -> None:
    with ThreadPoolExecutor(1) as pool:

        async def charge() -> None:
            await asyncio.get_running_loop().run_in_executor(pool, case.bank.charge, "o-1")

        report = await case.prove(charge, ways=["cancel"])
    assert [point.effects for point in report.points] == [2]


async def test_with_threads_a_call_that_asks_its_layer_once_more_when_observed_is_not_blamed(case: Case) -> None:
    starts = 0

    @case.idempotent()
    async def look(number: int) -> None: ...

    @case.idempotent()
    async def charge(order_id: str) -> None:
        nonlocal starts
        starts += 1
        await asyncio.to_thread(int)
        if starts == 2:  # as where a slow answer is asked for again
            await look(starts)

    report = await case.prove(lambda: charge("o-1"), effects=lambda: 1, ways=["lost_request", "lost_reply"])
    assert starts > 3
    report.check()
    assert [point.when for point in report.points] == ["acquire", "complete"] * 2


async def test_another_executor_is_left_alone(case: Case) -> None:
    class AtOnce(Executor):
        def submit(self, function: Any, /, *args: Any, **options: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(function(*args))
            return future

    async def charge() -> None:
        await asyncio.get_running_loop().run_in_executor(AtOnce(), case.bank.charge, "o-1")

    report = await case.prove(charge, ways=["cancel"])
    assert [(point.line, point.effects) for point in report.points] == [
        ('await asyncio.get_running_loop().run_in_executor(AtOnce(), case.bank.charge, "o-1")', 2)
    ]


class Session:
    """What complains of not being closed, as the session of an HTTP client does.

    Attributes:
        is_closed: Whether it was.
    """

    def __init__(self, complaints: list[str]) -> None:
        self.loop = asyncio.get_running_loop()
        self.is_closed = False
        self._complaints = complaints

    def __del__(self) -> None:
        if not self.is_closed:
            self._complaints.append("not closed")


async def test_connections_break_when_their_process_vanishes_and_no_finalizer_complains(case: Case) -> None:
    opened, broken = 0, asyncio.Semaphore(0)
    complaints: list[str] = []
    sessions: list[Session] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal opened
        opened += 1
        with contextlib.suppress(ConnectionError):
            while await reader.read(100):
                writer.write(b"charged")
        broken.release()
        writer.close()

    @case.idempotent()
    async def charge(order_id: str, port: int) -> None:
        sessions.append(Session(complaints))
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(order_id.encode())
        await reader.readexactly(7)
        writer.close()
        await writer.wait_closed()
        sessions[-1].is_closed = True

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        report = await case.prove(lambda: charge("o-1", port), effects=lambda: 1, ways=["vanish"])
        for _ in range(opened):
            await broken.acquire()
    assert {point.outcome for point in report.points if point.reached} == {"returned"}
    assert "await reader.readexactly(7)" in {point.line for point in report.points if point.reached}
    vanished = sum(not session.is_closed for session in sessions)
    assert vanished >= 2
    sessions.clear()
    gc.collect()
    assert complaints == []


async def test_a_sqlite_layer(case: Case, tmp_path: Path) -> None:
    async with SQLitePersistenceLayer(tmp_path / "records.sqlite3", clock=case.clock) as layer:

        @idempotent_function(key_prefix="case", persistence_store=layer)
        async def charge(order_id: str) -> None:
            case.bank.charge(order_id)
            await asyncio.sleep(45)

        report = await case.prove(lambda: charge("o-1"))
    assert wrong(report) == {("vanish", "await asyncio.sleep(45)"), ("cancel", "await asyncio.sleep(45)")}
    assert {point.when for point in report.points} >= {"during acquire", "during complete"}


async def test_two_layers(case: Case) -> None:
    other = MemoryPersistenceLayer(clock=case.clock)

    @idempotent_function(key_prefix="inner", persistence_store=other)
    async def charge(order_id: str) -> None:
        case.bank.charge(current_execution().key_for("bank"))
        await asyncio.sleep(0)

    @case.idempotent()
    async def order(order_id: str) -> None:
        await charge(order_id)

    report = await case.prove(lambda: order("o-1"), effects=case.bank.count_once)
    report.check()
    assert [point.when for point in report.points if point.way == "lost_reply"] == [
        "acquire",
        "acquire",
        "complete",
        "complete",
    ]


async def test_a_layer_with_slots_is_as_it_was_afterwards_and_meanwhile_on_other_loops(case: Case) -> None:
    class Slotted(MemoryPersistenceLayer):
        __slots__ = ()

    layer = Slotted(clock=case.clock)

    @idempotent_function(key_prefix="case", persistence_store=layer)
    async def charge(order_id: str) -> None:
        case.bank.charge(order_id)

    async def count() -> int:
        assert isinstance(layer.get("none"), Immediate)
        return case.bank.count()

    (await case.prove(lambda: charge("o-1"), effects=count, ways=["lost_reply"])).check()
    assert type(layer) is Slotted


# --- Where it runs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", [asyncio.SelectorEventLoop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
@pytest.mark.parametrize("debug", [False, True])
def test_it_runs_in_any_loop(case: Case, factory: Any, *, debug: bool) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None:
        case.bank.charge(current_execution().key_for("bank"))
        await asyncio.sleep(0)

    with asyncio.Runner(loop_factory=factory, debug=debug) as runner:
        runner.run(case.prove(lambda: charge("o-1"), effects=case.bank.count_once)).check()


async def test_it_can_be_cancelled(case: Case) -> None:
    threads = set(threading.enumerate())

    async def charge() -> None:
        await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await case.prove(charge)
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
        assert not thread.is_alive()


if sys.version_info < (3, 13):  # whose event loop names what a factory returns

    async def test_what_a_task_factory_of_the_call_does_with_coroutines_is_its_own_affair(case: Case) -> None:
        async def at_once() -> str:
            case.bank.charge("o-1")
            return "charged"

        def eager(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Future[Any]:
            """Do what tasks that start eagerly do, of Python 3.12 and newer."""
            assert coroutine.cr_code
            done = loop.create_future()
            with pytest.raises(StopIteration, match="charged"):
                coroutine.send(None)
            done.set_result(None)
            return done

        def closing(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Future[Any]:
            coroutine.close()
            done = loop.create_future()
            done.set_result(None)
            return done

        def wrapping(loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task[Any]:
            async def wrapped() -> Any:
                return await coroutine

            return asyncio.Task(wrapped(), loop=loop, **options)

        async def charge(factory: Any) -> None:
            loop = asyncio.get_running_loop()
            loop.set_task_factory(factory)
            child = loop.create_task(at_once())
            loop.set_task_factory(None)
            await asyncio.sleep(0)
            await child

        for factory, effects in ((eager, 2), (closing, 0), (wrapping, 2)):
            report = await case.prove(lambda: charge(factory), ways=["cancel"])  # noqa: B023 - it is called at once
            assert [(point.line, point.effects) for point in report.points if "sleep" in point.line] == [
                ("await asyncio.sleep(0)", effects)
            ]


if sys.version_info >= (3, 12):

    async def test_tasks_that_start_eagerly_vanish_with_the_step_that_starts_them(case: Case) -> None:
        async def child() -> None:
            case.bank.charge("o-1")
            await asyncio.sleep(0)

        @case.idempotent()
        async def charge(order_id: str) -> None:
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
            try:
                await asyncio.create_task(child())
            finally:
                await asyncio.sleep(0)

        report = await case.prove(lambda: charge("o-1"), ways=["vanish"])
        assert ("vanish", "await asyncio.sleep(0)") in wrong(report)


async def test_what_a_call_leaves_behind_goes_on_for_a_while_and_then_ends(case: Case) -> None:
    ended: list[str] = []
    tasks: set[asyncio.Task[None]] = set()

    async def tick() -> None:
        try:
            while True:  # noqa: ASYNC110 - it ticks
                await asyncio.sleep(1)
        finally:
            ended.append("tick")

    async def stubborn() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    @case.idempotent()
    async def charge(order_id: str) -> None:
        tasks.update(asyncio.create_task(task) for task in (tick(), stubborn()))

    report = await case.prove(lambda: charge("o-1"), ways=["lost_reply"], effects=lambda: 1)
    assert len(ended) == 2 + len(report.points)


# --- Bad input --------------------------------------------------------------------------------------------------------


async def test_a_call_that_cannot_be_awaited_is_refused(case: Case) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None: ...

    @sync.idempotent_function(key_prefix="sync", persistence_store=case.layer)
    def charge_in_thread(order_id: str) -> None: ...

    @lambda_handler
    @idempotent(key_prefix="handler", persistence_store=case.layer)
    async def handler(event: Any, context: Any) -> None: ...

    coroutine = charge("o-1")
    task = asyncio.ensure_future(charge("o-2"))
    refused: list[tuple[Callable[[], Any], str]] = [
        (lambda: 3, "must return something to await, not int"),
        (lambda: task, "of another event loop"),
        (lambda: coroutine, "awaited before"),
        (lambda: charge_in_thread("o-1"), "aidem.sync and other blocking calls cannot run on an event loop"),
        (lambda: handler({}, None), r"lambda: handler.__wrapped__\(event, context\)"),
        (lambda: 1 // 0, "raised ZeroDivisionError before it returned"),
    ]
    for call, message in refused:
        with pytest.raises(IdempotencyUsageError, match=f"crash_everywhere: call.*{message}"):
            await case.prove(call)
    await task


async def test_a_nested_event_loop_is_the_error_of_the_call(case: Case) -> None:
    async def nothing() -> None: ...

    async def charge() -> None:
        never = nothing()
        try:
            asyncio.run(never)
        finally:
            never.close()

    report = await case.prove(charge, ways=["vanish"], effects=lambda: 1)
    assert {point.outcome for point in report.points} == {"raised RuntimeError"}


def test_a_test_without_an_asyncio_loop_is_refused(case: Case) -> None:
    proving = case.prove(lambda: asyncio.sleep(0))
    with pytest.raises(IdempotencyUsageError, match="the test must run on an asyncio event loop"):
        proving.send(None)


async def test_a_layer_without_the_clock_is_refused(case: Case) -> None:
    class Clockless(MemoryPersistenceLayer): ...

    clockless = Clockless()
    del clockless.clock
    for layer in (MemoryPersistenceLayer(), MemoryPersistenceLayer(clock=FakeClock()), clockless):

        @idempotent_function(key_prefix="case", persistence_store=layer)
        async def charge(order_id: str) -> None:
            await asyncio.sleep(0)

        with pytest.raises(IdempotencyUsageError, match="that does not go by this clock"):
            await case.prove(lambda: charge("o-1"))


async def test_two_at_once_on_one_layer_are_refused(case: Case) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None:
        await asyncio.sleep(0)

    proving = (case.prove(lambda: charge("o-1"), effects=lambda: 1) for _ in range(2))
    reports = await asyncio.gather(*proving, return_exceptions=True)
    [error] = [report for report in reports if isinstance(report, BaseException)]
    assert "is being watched already" in str(error)
    assert type(case.layer) is MemoryPersistenceLayer


@pytest.mark.parametrize("name", ["effects", "reset"])
async def test_effects_and_reset_that_fail_are_named(case: Case, name: str) -> None:
    async def charge() -> None: ...

    with pytest.raises(IdempotencyUsageError, match=rf"{name}\(\) raised ZeroDivisionError") as failed:
        await case.prove(charge, **{name: lambda: 1 // 0})
    assert isinstance(failed.value.__cause__, ZeroDivisionError)


async def test_effects_and_reset_that_fail_later_name_the_point_before(case: Case) -> None:
    async def charge() -> None:
        case.bank.charge("o-1")
        await asyncio.sleep(0)

    def refuse_a_second_charge() -> int:
        return 1 // (len(case.bank.charges) < 2)

    pattern = r'effects\(\) raised ZeroDivisionError after the call, in the way "vanish" at tests/.*:\d+$'
    with pytest.raises(IdempotencyUsageError, match=pattern):
        await case.prove(charge, effects=refuse_a_second_charge)


async def test_effects_that_are_no_number_are_refused(case: Case) -> None:
    async def charge() -> None: ...

    with pytest.raises(IdempotencyUsageError, match="how often the effect has happened, not list"):
        await case.prove(charge, effects=list)


@pytest.mark.parametrize(
    "options",
    [{"ways": "vanish"}, {"ways": []}, {"ways": ["explode"]}, {"ways": None}, {"timeout_seconds": 0}],
    ids=str,
)
async def test_options_that_cannot_be_used_are_refused(case: Case, options: dict[str, Any]) -> None:
    async def charge() -> None: ...

    with pytest.raises(IdempotencyConfigError, match="is not allowed: it must be"):
        await case.prove(charge, **options)


async def test_ways_without_a_point_are_refused(case: Case) -> None:
    async def charge() -> None: ...

    with pytest.raises(IdempotencyUsageError, match="these ways have no point"):
        await case.prove(charge, ways=["lost_request"])


async def test_a_call_that_differs_from_run_to_run_is_reported(case: Case) -> None:
    starts = 0

    @case.idempotent()
    async def charge(order_id: str) -> None:
        nonlocal starts
        starts += 1
        if starts <= 2:
            await asyncio.sleep(0)
        case.bank.charge(current_execution().key_for("bank"))

    report = await case.prove(lambda: charge("o-1"), effects=case.bank.count_once, ways=["cancel"])
    [missed] = [point for point in report.points if not point.reached]
    assert missed.line == "await asyncio.sleep(0)"
    assert missed.outcome == "did not reach this point: the call took another way"
    with pytest.raises(AssertionError, match="1 did not reach their point, so the call differs from run to run"):
        report.check()


@pytest.mark.parametrize("seconds", [0, 60, None], ids=["turns", "timers", "nothing"])
async def test_a_call_that_never_ends_is_an_error_that_names_its_line(case: Case, seconds: float | None) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None:
        while True:
            await (asyncio.Event().wait() if seconds is None else asyncio.sleep(seconds))

    pattern = r"did not end within 1 s, undisturbed; it waits at tests/.*:\d+: await \(asyncio"
    with pytest.raises(TimeoutError, match=pattern):
        await case.prove(lambda: charge("o-1"), timeout_seconds=1)


async def test_a_call_that_does_not_end_once_it_is_cancelled_is_an_error_that_names_the_point(case: Case) -> None:
    @case.idempotent()
    async def charge(order_id: str) -> None:
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError, match=r'in the way "cancel" at .*; it waits at .*: await asyncio.Event\(\)'):
        await case.prove(lambda: charge("o-1"), timeout_seconds=2)


async def test_a_call_that_blocks_its_thread_is_an_error_that_names_its_line(case: Case) -> None:
    async def charge() -> None:
        time.sleep(3)  # noqa: ASYNC251 - that is the mistake

    with pytest.raises(TimeoutError, match=r"it is blocked at .*time.sleep"):
        await case.prove(charge, timeout_seconds=0.2)
    for thread in threading.enumerate():
        if thread.name == "crash_everywhere":
            thread.join(10)


# --- The report -------------------------------------------------------------------------------------------------------


def test_a_report_is_a_table_and_json() -> None:
    point = CrashPoint(way="vanish", where="pay.py:4", line="await pay()", effects=2, outcome="returned")
    report = CrashReport((point, point))
    assert str(report).splitlines() == [
        "runs  effects  way     where     line         when  outcome",
        "2     2        vanish  pay.py:4  await pay()        returned",
    ]
    assert json.loads(report.as_json()) == 2 * [
        {
            "way": "vanish",
            "where": "pay.py:4",
            "line": "await pay()",
            "effects": 2,
            "outcome": "returned",
            "when": "",
            "reached": True,
        }
    ]
    with pytest.raises(AssertionError, match="must happen 3 to 4 times"):
        report.check(at_least=3, at_most=4)


def test_without_a_line_of_the_users_none_is_named(tmp_path: Path) -> None:
    code = """
import asyncio, functools
from aidem.testing import FakeClock, crash_everywhere

proving = crash_everywhere(functools.partial(asyncio.sleep, 0), clock=FakeClock(), effects=lambda: 1)
report = asyncio.run(proving)
print({(point.where, point.line) for point in report.points})
"""
    (tmp_path / "site-packages").mkdir()
    done = run_file(tmp_path / "site-packages" / "charge.py", code)
    assert (done.stdout, done.stderr) == ("{('', '')}\n", "")
