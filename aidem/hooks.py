"""Events about calls, and the hooks in `IdempotencyConfig.hooks` that get them."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from contextvars import Context
from dataclasses import dataclass
from enum import StrEnum
from threading import Thread
from typing import TYPE_CHECKING, Final, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import asyncio

logger = logging.getLogger("aidem")


class EventKind(StrEnum):
    """The kind of an event; docs/observing.md describes each."""

    CLAIMED = "claimed"
    EXECUTED = "executed"
    RELEASED = "released"
    IN_DOUBT = "in_doubt"
    ABANDONED = "abandoned"
    REPLAYED = "replayed"
    CONFLICT = "conflict"
    WAITED = "waited"
    TAKEN_OVER = "taken_over"
    CHECKED = "checked"
    LEASE_LOST = "lease_lost"
    BYPASSED = "bypassed"
    RESULT_UNAVAILABLE = "result_unavailable"
    PERSISTENCE_ERROR = "persistence_error"


ENDINGS: Final = frozenset({EventKind.EXECUTED, EventKind.RELEASED, EventKind.IN_DOUBT, EventKind.ABANDONED})
"""The kinds of events that end a claim: each `CLAIMED` is followed by exactly one of them, with the same key and fence.

Only a process that is killed or exits in the middle of the call reports none.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class IdempotencyEvent:
    """An event in the course of a call.

    Attributes:
        kind: The kind of event.
        key: The idempotency key; `""` if the call has none.
        function: Module and qualified name of the function. For a block or the HTTP layer: `the block` or
            `the HTTP layer`, and its key prefix.
        fence: The fence of the claim; 0 if nothing was claimed.
        duration_seconds: Seconds since the start of the call.
        body_seconds: How long the body ran, for the kinds in `ENDINGS`: without waiting for other calls and for the
            store before and after it. None for all other kinds.
        error: The exception, for `PERSISTENCE_ERROR`, `CONFLICT` and `RESULT_UNAVAILABLE`; for an ending the exception
            of the body, or the reason why the claim was abandoned; for `CHECKED` the exception of the check. Default:
            None.
        verdict: For `CHECKED`, what the check has found out. Default: None.
    """

    kind: EventKind
    key: str
    function: str
    fence: int
    duration_seconds: float
    body_seconds: float | None = None
    error: BaseException | None = None
    verdict: Literal["happened", "did_not_happen", "still_unknown"] | None = None


@runtime_checkable
class IdempotencyHook(Protocol):
    """An observer of calls.

    It is called synchronously within the call, so it must be quick. An exception that it raises is logged and otherwise
    ignored.
    """

    def on_event(self, event: IdempotencyEvent, /) -> None:
        """Handle an event."""
        ...


class Reporter:
    """Sends the events of one call to its hooks, and sees to it that a claim has exactly one ending."""

    __slots__ = ("_claim", "_function", "_held_back", "_holds_back", "_hooks", "_key", "_started_at")

    def __init__(self, hooks: tuple[IdempotencyHook, ...], *, key: str, function: str) -> None:
        self._claim: _ReportedClaim | None = None
        self._hooks = hooks
        self._key = key
        self._function = function
        self._started_at = time.monotonic() if hooks else 0.0
        self._holds_back = False
        self._held_back: list[IdempotencyEvent] = []

    def report(
        self,
        kind: EventKind,
        *,
        fence: int = 0,
        error: BaseException | None = None,
        verdict: Literal["happened", "did_not_happen", "still_unknown"] | None = None,
    ) -> None:
        """Report an event, if there are hooks; of `ENDINGS` only one, and only after `report_claim`."""
        if kind in ENDINGS:
            self.report_end(kind, error=error)
        elif self._hooks:
            self._send(kind, fence=fence, error=error, verdict=verdict)

    def report_claim(self, *, fence: int, unless_ended: EventKind, loop: asyncio.AbstractEventLoop) -> None:
        """Report that the body is about to run under a claim.

        Args:
            fence: The fence of the claim.
            unless_ended: What is reported if the call ends, or is dropped, without another ending.
            loop: The loop that runs the call; its clock measures the body.
        """
        claim = self._claim = _ReportedClaim(fence, unless_ended, loop)
        self._send(EventKind.CLAIMED, fence=fence)
        claim.body_began_at = loop.time()  # hooks may have taken a while

    def end_body(self, error: BaseException | None = None) -> None:
        """Stop measuring the body; the first time counts. `error` is the exception that it has raised."""
        if self._claim is not None:
            self._claim.end_body(error)

    def report_end(self, kind: EventKind | None = None, *, error: BaseException | None = None) -> None:
        """Report the ending of the claim, if it was reported and has none yet. Default: the one for want of another."""
        claim, self._claim = self._claim, None
        if claim is None or claim.pid != os.getpid():  # in a fork: the process that made the claim reports its end
            return
        claim.end_body(None)
        self._send(
            kind or claim.unless_ended,
            fence=claim.fence,
            error=claim.body_error or error,
            body_seconds=claim.body_seconds,
        )

    def __del__(self) -> None:
        # The call was dropped: the block was never left, or no loop was there to release its claim. A finalizer may run
        # at any point, also while this thread holds the lock of a hook, so it must not call hooks itself.
        claim = self._claim
        if claim is not None and claim.pid == os.getpid():
            loop = claim.loop
            with contextlib.suppress(RuntimeError):  # it is closed meanwhile, or the interpreter exits
                if loop.is_closed():
                    Thread(target=self.report_end, daemon=True).start()
                else:
                    loop.call_soon_threadsafe(self.report_end, context=Context())

    def _send(
        self,
        kind: EventKind,
        *,
        fence: int,
        error: BaseException | None = None,
        body_seconds: float | None = None,
        verdict: Literal["happened", "did_not_happen", "still_unknown"] | None = None,
    ) -> None:
        event = IdempotencyEvent(
            kind=kind,
            key=self._key,
            function=self._function,
            fence=fence,
            duration_seconds=time.monotonic() - self._started_at,
            body_seconds=body_seconds,
            error=error,
            verdict=verdict,
        )
        if self._holds_back:
            self._held_back.append(event)
        else:
            self._tell(event)

    def hold_back(self) -> None:
        """Keep events until `tell_held_back` is called, in the thread in which hooks must run."""
        self._holds_back = True

    def tell_held_back(self) -> None:
        """Tell the hooks what was held back; what an interrupt leaves untold is told the next time."""
        self._holds_back = False
        while self._held_back:
            self._tell(self._held_back.pop(0))

    def _tell(self, event: IdempotencyEvent) -> None:
        for hook in self._hooks:
            try:
                hook.on_event(event)
            except Exception:
                logger.exception("a hook failed on the event %s", event.kind)


class _ReportedClaim:
    """A claim that was reported and has not ended, and how long its body has run."""

    __slots__ = ("body_began_at", "body_error", "body_seconds", "fence", "loop", "pid", "unless_ended")

    def __init__(self, fence: int, unless_ended: EventKind, loop: asyncio.AbstractEventLoop) -> None:
        self.fence = fence
        self.unless_ended = unless_ended
        self.loop = loop
        self.pid = os.getpid()
        self.body_began_at = loop.time()
        self.body_seconds: float | None = None
        self.body_error: BaseException | None = None

    def end_body(self, error: BaseException | None) -> None:
        """Note that the body has ended, unless that was noted before."""
        if self.body_seconds is None:
            self.body_seconds = self.loop.time() - self.body_began_at
            self.body_error = error


SILENT: Final = Reporter((), key="", function="")
"""For calls without hooks."""
