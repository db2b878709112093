"""Ctrl-C and SIGTERM while an event loop runs: they cancel a task, which cleans up, instead of striking anywhere."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from typing import TYPE_CHECKING, Any, Final, Self

if TYPE_CHECKING:
    import asyncio
    from types import FrameType

_DEFAULTS: Final[dict[int, Any]] = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}


class Interrupts:
    """A section in which an interrupt cancels a task; leaving it delivers the interrupt, as an exception.

    A second interrupt strikes at once. Signals with a handler of other code are left alone, also if it was
    installed meanwhile.

    Args:
        loop: The loop of the task.
        task: The task that is cancelled.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        self._loop = loop
        self._task = task
        self._pid = os.getpid()
        self._taken: list[int] = []
        self._interrupt: BaseException | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # no other hears of signals
            self._taken = [number for number, default in _DEFAULTS.items() if signal.getsignal(number) is default]
        for number in self._taken:
            # For the wake-up that comes with it: a signal may arrive when the loop has just made up its mind to wait.
            with contextlib.suppress(NotImplementedError):  # where it is not needed
                self._loop.add_signal_handler(number, _nothing)
            signal.signal(number, self._interrupted)
        return self

    def __exit__(self, *_: object) -> None:
        for number in self._taken:
            if signal.getsignal(number) == self._interrupted:
                with contextlib.suppress(NotImplementedError):
                    self._loop.remove_signal_handler(number)
                signal.signal(number, _DEFAULTS[number])
        if self._interrupt is not None:
            raise self._interrupt

    def _interrupted(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a child that was forked meanwhile, by multiprocessing for example
            signal.signal(number, _DEFAULTS[number])
            signal.raise_signal(number)
        else:
            interrupt = KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
            if self._interrupt is not None:
                raise interrupt
            self._interrupt = interrupt
            self._task.cancel()
            self._loop.call_soon_threadsafe(_nothing)  # it may be waiting, and looks only when it is woken


def _nothing() -> None:
    """Do nothing."""
