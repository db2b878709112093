"""Events of calls, passed to the objects in `IdempotencyConfig.hooks`."""

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
    """One event of one call.

    Attributes:
        kind: The kind of the event.
        key: The idempotency key; `""` if the call has none.
        function: Module and qualified name of the function; for a block or an HTTP request, `the block` or
            `the HTTP layer` and the key prefix.
        fence: The fence of the claim; 0 if nothing was claimed.
        duration_seconds: Time since the start of the call.
        error: The error, for `PERSISTENCE_ERROR`, `CONFLICT` and `RESULT_UNAVAILABLE`. Default: None.
    """

    kind: EventKind
    key: str
    function: str
    fence: int
    duration_seconds: float
    error: BaseException | None = None


@runtime_checkable
class IdempotencyHook(Protocol):
    """An observer. The call waits for it, so it must be quick; if it raises an `Exception`, this is logged."""

    def on_event(self, event: IdempotencyEvent, /) -> None:
        """Handle an event."""
        ...


class Reporter:
    """Tells the hooks of one call what happens to it.

    Attributes:
        redirect: Takes each event instead of the hooks, for fronts whose hooks must run in another thread.
    """

    __slots__ = ("_function", "_hooks", "_key", "_started_at", "redirect")

    def __init__(self, hooks: tuple[IdempotencyHook, ...], *, key: str, function: str) -> None:
        self._hooks = hooks
        self._key = key
        self._function = function
        self._started_at = time.monotonic() if hooks else 0.0
        self.redirect: Callable[[IdempotencyEvent], None] | None = None

    def report(self, kind: EventKind, *, fence: int = 0, error: BaseException | None = None) -> None:
        """Report an event; costs next to nothing where nobody listens."""
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
        """Hand an event to every hook."""
        for hook in self._hooks:
            try:
                hook.on_event(event)
            except Exception:
                logger.exception("a hook failed on the event %s", event.kind)


SILENT: Final = Reporter((), key="", function="")
"""For calls that nobody observes."""
