"""What a check is told of an execution whose owner vanished, and what it answers: whether the effect happened."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from aidem._rules.key import derived_key

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aidem._rules.record import DataRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class AbandonedExecution:
    """An execution whose owner vanished, as a check in `on_abandoned` sees it.

    Attributes:
        key: The idempotency key.
        payload: What the key of the asking call was made from: the event, the named parameter, all arguments by name,
            or the payload of the block, else its key. Over HTTP the ASGI scope of the request.
        record: The claim that was found, perhaps that of an earlier check.
        fence: The new fence, under which the function runs after `DidNotHappen()`. A downstream system that checks
            fences refuses the vanished owner once it has seen this one.
    """

    key: str
    payload: Any = field(repr=False)
    record: DataRecord
    fence: int

    def key_for(self, name: str) -> str:
        """Return the key for a downstream service that `Execution.key_for` gave the vanished execution."""
        return derived_key(self.key, name)


@dataclass(frozen=True, slots=True)
class Happened:
    """The effect happened: the result is recorded, and this and later callers get it.

    Attributes:
        result: What the function would have returned. Default: None. Over HTTP a Starlette `Response` that has its
            body, or an `aidem.asgi.StoredResponse`.
    """

    result: Any = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class DidNotHappen:
    """The effect did not happen and will not happen any more: the function runs."""


@dataclass(frozen=True, slots=True)
class StillUnknown:
    """Nobody knows yet: the key stays in doubt, and callers get `IdempotencyInDoubtError`."""


Verdict: TypeAlias = Happened | DidNotHappen | StillUnknown

VERDICTS = (Happened, DidNotHappen, StillUnknown)

if TYPE_CHECKING:
    Check: TypeAlias = Callable[[AbandonedExecution], Verdict | Awaitable[Verdict]]
