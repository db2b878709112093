"""Threads and locks of the operating system, also where gevent has put greenlets in their place.

asyncio knows threads only: under gevent it would take every greenlet of a thread for one that runs its event loop. So
the background loop, and what works for it, have real threads. The locks here are real as well, so hold them only over
steps that switch to no greenlet. Only what waits for the background loop lets other greenlets run meanwhile.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from aidem.exceptions import IdempotencyUsageError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Lock", "SimpleQueue", "Thread", "event_loop", "has_caller_ended", "held_lock", "is_patched", "thread_for"]


def _original(module: str, name: str) -> Any:
    """Return an object of the standard library, also after gevent has replaced it."""
    monkey = sys.modules.get("gevent.monkey")
    return getattr(import_module(module), name) if monkey is None else monkey.get_original(module, name)


if TYPE_CHECKING:
    from queue import SimpleQueue
    from threading import Lock
else:
    Lock = _original("_thread", "allocate_lock")
    SimpleQueue = _original("queue", "SimpleQueue")


class Thread(Protocol):
    """A daemon thread."""

    def start(self) -> None:
        """Start it."""

    def is_alive(self) -> bool:
        """Whether it has started and has not ended."""
        ...

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended."""


def thread_for(target: Callable[[], object], *, name: str) -> Thread:
    """Return a thread that will call something."""
    if not _is_patched("threading"):
        return threading.Thread(target=target, name=name, daemon=True)
    from aidem._runtime.greenlets import OSThread

    return OSThread(target)


def event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop that another thread will run.

    Raises:
        IdempotencyUsageError: eventlet has patched the standard library.
    """
    patcher = sys.modules.get("eventlet.patcher")
    if patcher is not None and any(map(patcher.is_monkey_patched, ("thread", "select", "socket"))):
        raise IdempotencyUsageError(
            "aidem.sync needs a thread with an event loop, which eventlet's monkey_patch() does not leave it; "
            "run this on threads or gevent instead"
        )
    if not is_patched():
        return asyncio.new_event_loop()
    from aidem._runtime.greenlets import GeventLoop

    return GeventLoop()


def held_lock() -> Any:
    """Return a lock that is held; a greenlet that waits for it lets others run."""
    if is_patched():
        from aidem._runtime.greenlets import GreenletLock, is_hub_running

        if not is_hub_running():
            return GreenletLock()
    lock = Lock()
    lock.acquire()
    return lock


def has_caller_ended() -> Callable[[], bool]:
    """Return a function that tells whether the thread or greenlet that calls this has ended."""
    if _is_patched("threading"):
        from gevent import getcurrent

        greenlet = getcurrent()
        return lambda: greenlet.dead
    thread = threading.current_thread()
    return lambda: not thread.is_alive()


def is_patched() -> bool:
    """Whether gevent has replaced threads, or what waits for sockets."""
    return _is_patched("threading") or _is_patched("select")


def _is_patched(module: str) -> bool:
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and monkey.is_module_patched(module)
