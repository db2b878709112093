"""The check that a call asks of an execution whose owner vanished: it sees what has acted, and fences it off."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from aidem import AbandonedExecution, DidNotHappen, Happened, StillUnknown, Verdict
from tests.simulation.network import CURRENT

if TYPE_CHECKING:
    from tests.simulation.call import Call


async def check(abandoned: AbandonedExecution) -> Verdict:
    """Take some time, then tell the truth, or that it is not known, or fail."""
    call = CURRENT.get()
    assert call is not None
    world, rng, conditions = call.world, call.world.rng, call.world.conditions
    lease = conditions.lease_or(3)
    is_quiet = world.is_calm or conditions.is_gentle
    try:
        await asyncio.sleep(rng.choice([0.0, rng.uniform(0, 0.2), 0.0 if is_quiet else rng.uniform(0, 2.5 * lease)]))
    except asyncio.CancelledError:
        world.happened["check: is cancelled"] += 1
        raise
    said = "knows" if world.is_calm else rng.choice(["knows", "knows", "knows", "still unknown", "None", "fails"])
    verdict: Verdict | None = None
    if said == "fails":
        world.happened["check: fails"] += 1
        raise ValueError(call.number)
    if said == "still unknown":
        verdict = StillUnknown()
    elif said == "knows":
        verdict = _truth(call, abandoned)
        said = "happened" if isinstance(verdict, Happened) else "did not happen"
    world.happened[f"check: {said}"] += 1
    world.tell(f"{call}: its check says {said}")
    return cast("Verdict", verdict)


def _truth(call: Call, abandoned: AbandonedExecution) -> Verdict:
    """Say whose effect has happened; without any, let none of those who vanished act any more."""
    world = call.world
    owners = world.store.owners_before(abandoned.record.owner)
    vanished = [other for other in world.calls if other.bodies and other.owner in owners]
    for other in vanished:
        if other.has_acted:
            call.has_found_effect = True
            return Happened({"call": other.number})
    for other in vanished:
        other.is_fenced_off = True
    return DidNotHappen()
