"""Processes with an async Lambda handler that then end, or fork: `python -m tests.support.awslambda.scenes SCENE PATH`.

Each works on the SQLite file PATH, says on stdout what it got, and has nothing to say on stderr.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import sys
import time
import warnings
from collections.abc import AsyncGenerator, Callable
from multiprocessing.connection import Connection

from aidem import IdempotencyConfig, idempotent
from aidem.awslambda import lambda_handler
from aidem.persistence.sqlite import SQLitePersistenceLayer

HANGING_SECONDS = 3600.0
CHILD_SECONDS = 20.0


def say(line: object) -> None:
    os.write(1, f"{line}\n".encode())


layer = SQLitePersistenceLayer(sys.argv[-1])
config = IdempotencyConfig(wait_timeout_seconds=30.0)
clients: list[AsyncGenerator[None]] = []


@lambda_handler(warm=[layer])
@idempotent(persistence_store=layer, config=config)
async def handler(event: int, context: None) -> int:
    say(f"effect {event}")
    return event


@lambda_handler
@idempotent(persistence_store=layer, config=config, key_prefix="hanging")
async def hanging_handler(event: int, context: None) -> int:
    say("in the handler")
    await asyncio.sleep(HANGING_SECONDS)
    return event


async def client() -> AsyncGenerator[None]:
    try:
        yield
    finally:
        await asyncio.sleep(0)
        say("closed")


@lambda_handler
async def connecting_handler(event: None, context: None) -> None:
    clients.append(client())
    await anext(clients[0])


def plain() -> None:
    say(handler(1, None))


def client_open() -> None:
    connecting_handler(None, None)


def forked() -> None:
    """Call before a fork, and after it in both."""
    plain()
    pid = os.fork()
    say(handler(1, None))
    if pid == 0:
        say(handler(2, None))
        sys.exit(0)
    _, status = os.waitpid(pid, 0)
    say(f"child left with {os.waitstatus_to_exitcode(status)}")
    for _ in range(20):  # each waits for the thread of the layer, which wakes the loop
        handler(2, None)
    say(handler(2, None))


def interrupted() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    hanging_handler(1, None)


def hang(is_ready: Connection) -> None:
    is_ready.send(None)
    time.sleep(HANGING_SECONDS)


@lambda_handler
async def forking_handler(event: None, context: None) -> None:
    ready, is_ready = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=hang, args=(is_ready,))
    child.start()
    ready.recv()
    child.terminate()
    child.join(CHILD_SECONDS)
    say(f"child left with {child.exitcode}")
    child.kill()
    child.join()


def forking() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    forking_handler(None, None)


SCENES: dict[str, Callable[[], None]] = {
    "plain": plain,
    "client-open": client_open,
    "forked": forked,
    "interrupted": interrupted,
    "forking": forking,
}

if __name__ == "__main__":
    warnings.simplefilter("error")  # only now, for tools that measure this process may warn while it starts
    SCENES[sys.argv[1]]()
