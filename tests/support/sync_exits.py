"""Processes that make blocking calls and then end, or fork: `python -m tests.support.sync_exits SCENE PATH`.

Each works on the SQLite file PATH, says on stdout what it got, and has nothing to say on stderr.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable
from typing import Any

from aidem import IdempotencyConfig, current_execution, sync
from aidem._runtime import background_loop
from aidem.exceptions import IdempotencyLeaseLostError
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.persistence.sqlite import SQLitePersistenceLayer
from tests.support.planned import PlannedLayer

PATH = os.environ.get("AIDEM_TEST_PATH") or sys.argv[-1]
LEASE_SECONDS = 3.0
HANGING_SECONDS = 3600.0


def say(line: object) -> None:
    os.write(1, f"{line}\n".encode())


layer = SQLitePersistenceLayer(PATH)
is_in_body = threading.Event()
config = IdempotencyConfig(lease_seconds=LEASE_SECONDS, wait_timeout_seconds=30.0)


@sync.idempotent_function(persistence_store=layer, config=config)
def charge(order: int) -> int:
    with open(f"{PATH}.log", "a", encoding="utf-8") as log:  # noqa: PTH123 - O_APPEND is the point
        log.write(f"{order}\n")
    time.sleep(0.01)
    return order


@sync.idempotent_function(persistence_store=layer, config=config)
def hang(order: int) -> None:
    say("in the body")
    is_in_body.set()
    time.sleep(HANGING_SECONDS)


def plain() -> None:
    say(charge(1))


def daemon_in_body() -> None:
    threading.Thread(target=hang, args=(1,), daemon=True).start()
    is_in_body.wait()
    plain()


def daemon_waiting() -> None:
    """End while a daemon waits for the outcome of another's call."""
    threading.Thread(target=hang, args=(1,), daemon=True).start()
    is_in_body.wait()
    threading.Thread(target=hang, args=(1,), daemon=True).start()
    plain()


def thread_after_main() -> None:
    def work() -> None:
        threading.main_thread().join()
        say(charge(2))

    threading.Thread(target=work).start()
    plain()


def call_at_exit() -> None:
    plain()
    atexit.register(lambda: say(charge(1)))


def closed() -> None:
    plain()
    sync.close()


def uncaught_interrupt() -> None:
    hang(1)


# --- Forks ------------------------------------------------------------------------------------------------------------


def fork(work: Callable[[], None]) -> None:
    """Do something in a child that then goes on where this is called from; wait for it here."""
    pid = os.fork()
    if pid == 0:
        work()
    else:
        _, status = os.waitpid(pid, 0)
        say(f"child left with {os.waitstatus_to_exitcode(status)}")


def is_child() -> bool:
    return os.getpid() != PARENT


PARENT = os.getpid()


def own(order: int) -> None:
    execution = current_execution()
    assert isinstance(execution, sync.Execution)
    try:
        execution.ensure_owned()
    except IdempotencyLeaseLostError:
        say("the child does not own the claim")
    say(f"the child gets {charge(order)} of its own")


@sync.idempotent_function(persistence_store=layer, config=config)
def fork_in_body(fails: bool) -> str:
    fork(lambda: own(7))
    if is_child() and fails:
        raise ValueError("the child fails")
    if not is_child():
        execution = current_execution()
        assert isinstance(execution, sync.Execution)
        execution.ensure_owned()
        time.sleep(1.2 * LEASE_SECONDS)  # it is renewed here all the time
    return "the child's" if is_child() else "the parent's"


def forked(*, fails: bool = False) -> None:
    try:
        result = fork_in_body(fails)
    except (IdempotencyLeaseLostError, ValueError) as error:
        say(f"{'child' if is_child() else 'parent'} gets {type(error).__name__}")
    else:
        say(f"{'child' if is_child() else 'parent'} gets {result}")
    if not is_child():
        say(f"a replay gets {fork_in_body(fails)}")


def forked_and_failing() -> None:
    forked(fails=True)


def forked_while_asking() -> None:
    """Fork while another thread is in the one section of the background loop that takes a lock."""
    is_locked, has_forked = threading.Event(), threading.Event()

    def ask() -> None:
        with background_loop._process.lock:
            is_locked.set()
            has_forked.wait()

    def call_in_child() -> None:
        plain()
        os._exit(0)

    thread = threading.Thread(target=ask)
    thread.start()
    is_locked.wait()
    fork(call_in_child)
    has_forked.set()
    thread.join()


class ClientLayer(PlannedLayer):
    """Keeps a client in an async generator, so that whoever closes the loop closes it."""

    client: Any = None

    async def _connect(self) -> AsyncIterator[None]:
        try:
            yield
        finally:
            say("closed")

    async def _do(self, operation: str, apply: Any) -> Any:
        if self.client is None:
            self.client = self._connect()
            await anext(self.client)
        return await super()._do(operation, apply)


def client() -> None:
    client_layer = ClientLayer(inner=MemoryPersistenceLayer(), clock=time.time)
    say(sync.idempotent_function(persistence_store=client_layer, key_prefix="client")(lambda: 1)())


def multiprocessing_by(method: str) -> None:
    plain()
    context: Any = multiprocessing.get_context(method)
    with context.Pool(3) as pool:
        say(sorted(pool.map(charge, [*range(2, 8), *range(2, 8)])))
        pool.close()
        pool.join()


SCENES: dict[str, Callable[[], None]] = {
    "plain": plain,
    "daemon-in-body": daemon_in_body,
    "daemon-waiting": daemon_waiting,
    "thread-after-main": thread_after_main,
    "call-at-exit": call_at_exit,
    "closed": closed,
    "uncaught-interrupt": uncaught_interrupt,
    "forked": forked,
    "forked-and-failing": forked_and_failing,
    "forked-while-asking": forked_while_asking,
    "client": client,
    "multiprocessing-fork": lambda: multiprocessing_by("fork"),
    "multiprocessing-spawn": lambda: multiprocessing_by("spawn"),
}

if __name__ == "__main__":
    warnings.simplefilter("error")  # only now, for tools that measure this process may warn while it starts
    os.environ["AIDEM_TEST_PATH"] = PATH
    # Under its own name, so that a child that is spawned finds the functions.
    __import__("tests.support.sync_exits")
    sys.modules["tests.support.sync_exits"].SCENES[sys.argv[1]]()
