"""A lock that a forked child can take, whichever thread of its parent held it."""

from __future__ import annotations

import os
from typing import Final
from weakref import WeakSet

from aidem._runtime.threads import Lock


class ForkSafeLock:
    """Has a lock, and in a forked child a fresh one: the thread that held the other does not exist there.

    So hold it only over steps that leave what it guards usable wherever they stop.
    """

    __slots__ = ("__weakref__", "lock")

    def __init__(self) -> None:
        self.lock = Lock()
        _all.add(self)


_all: Final[WeakSet[ForkSafeLock]] = WeakSet()


def _after_fork_in_child() -> None:
    for guard in _all:
        guard.lock = Lock()


# Where there is no fork, there is no such function either.
getattr(os, "register_at_fork", dict)(after_in_child=_after_fork_in_child)
