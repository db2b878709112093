"""All that the simulation knows of the inside of aidem: what is left behind, and what the controls break."""

from __future__ import annotations

import contextlib
import gc
from collections import Counter
from typing import TYPE_CHECKING, Any

from aidem._engine import claim
from aidem._engine.call import Call as EngineCall
from aidem._engine.claim import Claim, Renewal, ask
from aidem._engine.doubt import Doubt, Resolution
from aidem._engine.shared import LocalCache, SingleFlight, shared_by
from aidem._engine.waiting import WaitBudget
from aidem._rules import key as _key
from aidem._rules import lifecycle
from aidem._runtime import cancellation
from aidem._runtime.cancellation import CLEANUP_SECONDS, CancellationShield, writes
from aidem.hooks import EventKind, Reporter

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

    from aidem.persistence import PersistenceLayer

__all__ = [
    "CLEANUP_SECONDS",
    "CancellationShield",
    "Claim",
    "Doubt",
    "EngineCall",
    "EventKind",
    "LocalCache",
    "Reporter",
    "Resolution",
    "SingleFlight",
    "WaitBudget",
    "ask",
    "cancellation",
    "lifecycle",
]


@contextlib.contextmanager
def clock_since_boot(read: Callable[[], float]) -> Iterator[None]:
    """Let claims read this clock for one that goes on while the machine is suspended: it cannot be handed to them."""
    real, claim.seconds_since_boot = claim.seconds_since_boot, read
    try:
        yield
    finally:
        claim.seconds_since_boot = real


def key_text(prefix: str, selected: str) -> str:
    """Return the idempotency key of a selected value."""
    return _key.idempotency_key(prefix, _key.payload_digest(selected, "sha256"))


def objects_of_calls() -> Counter[str]:
    """Count what calls are made of and should not outlive them."""
    kinds = (Claim, Doubt, EngineCall, SingleFlight, Renewal)
    return Counter(type(found).__name__ for found in gc.get_objects() if type(found) in kinds)


def writes_of(loop: asyncio.AbstractEventLoop) -> list[asyncio.Task[Any]]:
    """Return the operations of a loop that run as tasks of their own."""
    return [write for write in writes if write.get_loop() is loop]


def forget_writes_of(loop: asyncio.AbstractEventLoop) -> None:
    """Drop them, of a process that crashed."""
    writes.difference_update(writes_of(loop))


def left_of_calls(layer: PersistenceLayer) -> list[object]:
    """Return the flights and renewals of a layer that have not ended."""
    states = list(shared_by(layer)._loops.values())
    return [state.flights for state in states if state.flights] + [
        state.renewals._due for state in states if state.renewals._due
    ]


def forget_loops_of(layer: PersistenceLayer) -> None:
    """Drop what the calls of a layer share: it would keep the layer alive."""
    shared_by(layer)._loops.clear()
