"""Events about calls, and the hooks in `IdempotencyConfig.hooks` that get them."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("aidem")


class EventKind(StrEnum):
    """The kind of an event; docs/observing.md describes each."""

    EXECUTED = "executed"
    REPLAYED = "replayed"
    CONFLICT = "conflict"
    WAITED = "waited"
    TAKEN_OVER = "taken_over"
    LEASE_LOST = "lease_lost"
    RELEASED = "released"
    BYPASSED = "bypassed"
    RESULT_UNAVAILABLE = "result_unavailable"
    PERSISTENCE_ERROR = "persistence_error"


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
        error: The exception, for `PERSISTENCE_ERROR`, `CONFLICT` and `RESULT_UNAVAILABLE`.
    """

    kind: EventKind
    key: str
    function: str
    fence: int
    duration_seconds: float
    error: BaseException | None = None


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
    """Sends the events of one call to its hooks.

    Attributes:
        redirect: A function that gets each event instead of the hooks, for fronts whose hooks must run in another
            thread.
    """

    __slots__ = ("_function", "_hooks", "_key", "_started_at", "redirect")

    def __init__(self, hooks: tuple[IdempotencyHook, ...], *, key: str, function: str) -> None:
        self._hooks = hooks
        self._key = key
        self._function = function
        self._started_at = time.monotonic() if hooks else 0.0
        self.redirect: Callable[[IdempotencyEvent], None] | None = None

    def report(self, kind: EventKind, *, fence: int = 0, error: BaseException | None = None) -> None:
        """Report an event, if there are hooks."""
        if self._hooks:
            event = IdempotencyEvent(
                kind=kind,
                key=self._key,
                function=self._function,
                fence=fence,
                duration_seconds=time.monotonic() - self._started_at,
                error=error,
            )
            (self.redirect or self.tell)(event)

    def tell(self, event: IdempotencyEvent) -> None:
        """Call every hook with an event."""
        for hook in self._hooks:
            try:
                hook.on_event(event)
            except Exception:
                logger.exception("a hook failed on the event %s", event.kind)


SILENT: Final = Reporter((), key="", function="")
"""For calls without hooks."""
