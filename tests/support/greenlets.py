"""Processes that gevent or eventlet has patched: `python -m tests.support.greenlets SCENE LAYER`.

A scene ends without a word, or fails. LAYER is a URL, as `open_persistence_layer` takes it.
"""

from __future__ import annotations

import sys

SCENE = sys.argv[1]
if SCENE == "imported-first":
    import aidem.persistence.sqlite
    import aidem.sync

if SCENE == "patched-late":
    import aidem.persistence.memory
    import aidem.sync

    aidem.sync.warm(aidem.persistence.memory.MemoryPersistenceLayer())

if SCENE.startswith("eventlet"):
    import warnings

    warnings.simplefilter("ignore")  # it advises against itself
    import eventlet

    eventlet.monkey_patch()
else:
    import gevent
    import gevent.monkey

    gevent.monkey.patch_all(thread=SCENE != "threads-unpatched")

import inspect
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import aidem.sync
from aidem import IdempotencyConfig, current_execution
from aidem.exceptions import IdempotencyUsageError
from aidem.persistence import open_persistence_layer

SLICES = 100 if SCENE in {"together", "imported-first", "threads-unpatched", "timed-out"} else 1
LEASE_SECONDS = 6.0 if sys.argv[2].startswith("dynamodb") else 3.0  # a process may have to wait for the processor
PREFIX = f"scene {os.getpid()}"  # scenes share a server
lease_seconds = LEASE_SECONDS if SCENE in {"together", "imported-first", "threads-unpatched"} else 20.0
config = IdempotencyConfig(lease_seconds=lease_seconds, wait_timeout_seconds=30.0)
begun: Counter[int] = Counter()
done: Counter[int] = Counter()


layer = open_persistence_layer(sys.argv[2])


@aidem.sync.idempotent_function(
    data_keyword_argument="order", persistence_store=layer, config=config, key_prefix=PREFIX
)
def charge(order: int, seconds: float = 0.01) -> int:
    begun[order] += 1
    for _ in range(SLICES):  # of which a pause of the process takes one only
        time.sleep(seconds / SLICES)  # lets other greenlets run, as whatever waits does
    done[order] += 1
    return order * 10


def together() -> None:
    """Each order once, also while its body outlasts its lease; meanwhile other greenlets run."""
    ticks = 0

    def tick() -> None:
        nonlocal ticks
        while True:
            time.sleep(0.005)
            ticks += 1

    ticking = gevent.spawn(tick)
    slow = [gevent.spawn(charge, -1, 1.5 * LEASE_SECONDS) for _ in range(2)]
    quick = [gevent.spawn(charge, order % 5) for order in range(25)]
    gevent.joinall([*slow, *quick], timeout=30, raise_error=True)
    ticking.kill()
    assert [call.value for call in slow] == [-10, -10]
    assert [call.value for call in quick] == [order % 5 * 10 for order in range(25)]
    assert set(begun.values()) == {1}, begun
    assert ticks > 40, ticks


def killed() -> None:
    """A killed greenlet gives its key back; one whose body had ended has recorded its result."""
    calls = [gevent.spawn(charge, number, 30.0) for number in range(5)]
    while len(begun) < 5:
        gevent.sleep(0.001)
    gevent.killall(calls)
    for number in range(300):
        calls.append(gevent.spawn(charge, number % 30))
        if number % 3 == 0:
            gevent.sleep(0.001)
        if number % 2 == 0:
            gevent.spawn_later(number % 41 * 0.001, calls[-1].kill, block=False)
    gevent.joinall(calls, timeout=30)
    ends = Counter(type(call.value).__name__ for call in calls)
    assert set(ends) == {"int", "GreenletExit"}, ends
    assert [charge(number) for number in range(30)] == [number * 10 for number in range(30)]
    assert set(done.values()) == {1}, done


def killed_in_its_body() -> None:
    call = gevent.spawn(charge, 1, 30.0)
    while not begun:
        time.sleep(0.001)
    call.kill()
    hasty = IdempotencyConfig()  # does not wait: the key was given back
    charge_at_once = aidem.sync.idempotent_function(
        data_keyword_argument="order", persistence_store=layer, config=hasty, key_prefix=PREFIX
    )(inspect.unwrap(charge))
    assert charge_at_once(1) == 10
    assert begun == {1: 2}


def timed_out() -> None:
    """gevent's time-outs are exceptions of the body and of the wait, like any other."""
    call = gevent.spawn(charge, 1, 1.0)
    while not begun:
        time.sleep(0.001)
    try:
        with gevent.Timeout(0.1):
            charge(1)
    except gevent.Timeout:
        pass
    else:
        raise AssertionError
    assert call.get() == charge(1) == 10
    assert begun == {1: 1}


def ensured() -> None:
    def body() -> int:
        execution: Any = current_execution()  # the one of blocking code
        execution.ensure_owned()
        return 1

    decorated = aidem.sync.idempotent_function(persistence_store=layer, key_prefix=f"{PREFIX} ensured")(body)
    assert gevent.spawn(decorated).get() == decorated() == 1


def in_threads_of_the_hub() -> None:
    pool = gevent.get_hub().threadpool
    assert [call.get() for call in [pool.spawn(charge, order % 2) for order in range(6)]] == [0, 10] * 3
    assert set(begun.values()) == {1}


def forked() -> None:
    assert charge(1) == 10
    child = os.fork()
    if child == 0:
        answers = charge(1), charge(2)
        os._exit(0 if answers == (10, 20) and begun == {1: 1, 2: 1} else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert charge(3) == 30


def closed_again_and_again() -> None:
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208

    charge(0)
    aidem.sync.close()
    before = descriptors()
    for order in range(1, 6):
        assert charge(order) == order * 10
        aidem.sync.close()
    assert descriptors() <= before


def called_by_the_hub() -> None:
    """A callback of the hub cannot switch to another greenlet, so the hub waits as a thread does."""
    answers: list[int] = []
    decorated = aidem.sync.idempotent_function(persistence_store=layer, key_prefix=f"{PREFIX} hub")(lambda: 1)
    gevent.get_hub().loop.run_callback(lambda: answers.append(decorated()))
    gevent.sleep(0.1)
    assert answers == [1]


def refused() -> None:
    try:
        charge(1)
    except IdempotencyUsageError as error:
        sentence = str(error)
    assert "eventlet" in sentence
    assert "gevent" in sentence
    assert not begun


SCENES: dict[str, Callable[[], None]] = {
    "together": together,
    "imported-first": together,
    "threads-unpatched": together,
    "patched-late": together,
    "killed": killed,
    "killed-in-its-body": killed_in_its_body,
    "timed-out": timed_out,
    "ensured": ensured,
    "in-threads-of-the-hub": in_threads_of_the_hub,
    "forked": forked,
    "closed-again-and-again": closed_again_and_again,
    "called-by-the-hub": called_by_the_hub,
    "eventlet": refused,
}

if __name__ == "__main__":
    SCENES[SCENE]()
