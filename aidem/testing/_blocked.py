"""What the contract says of `acquire` where a live record is found."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from anyio import to_thread

from aidem._rules.lifecycle import Blocked, Claimed, lease_end
from aidem.testing._base import LayerTests
from aidem.testing._trial import KEPT_SECONDS, LEASE_SECONDS, claim_of

if TYPE_CHECKING:
    from aidem.testing._trial import Trial


CONCURRENT_CLAIMS: Final = 20


class BlockedTests(LayerTests):
    """Ours: claimed as found. Everything else: blocked."""

    async def test_acquire_is_blocked_by_a_live_claim(self, trial: Trial) -> None:
        """With the claim found, which stays."""
        theirs = await trial.claimed(trial.claim("theirs", payload_hash="theirs"))
        assert await trial.blocked(trial.claim()) == theirs

    async def test_acquire_is_blocked_by_a_result(self, trial: Trial) -> None:
        """With the result, also where it is our own."""
        completed = await trial.completed(await trial.claimed(trial.claim()))
        assert await trial.blocked(trial.claim("theirs")) == completed
        assert await trial.blocked(trial.claim()) == completed

    async def test_blocked_tells_how_long_the_claim_still_holds(self, trial: Trial) -> None:
        """The time of the judgement and the instants found are of one clock."""
        await trial.claimed(trial.claim("theirs"))
        answer = await trial.acquire(trial.claim())
        assert isinstance(answer, Blocked)
        now = trial.clock() if answer.now is None else answer.now
        remaining_seconds = (lease_end(answer.record) or 0) / 1000 - now
        assert abs(remaining_seconds - LEASE_SECONDS) <= 0.001 + trial.tolerance_seconds

    async def test_acquire_finds_our_own_claim_again_as_it_was_stored(self, trial: Trial) -> None:
        """The reply to an earlier try was lost."""
        first = await trial.claimed(trial.claim(payload_hash="first"))
        answer = await trial.acquire(trial.claim(payload_hash="again", kept_seconds=2 * KEPT_SECONDS))
        assert answer == Claimed(first)
        assert await trial.stored() == first

    async def test_a_claim_without_owner_is_never_ours(self, trial: Trial) -> None:
        """Not even for a caller without owner; it lapses like any other."""
        await self.store_ownerless(trial.layer, trial.claim(None), now=trial.clock())
        await trial.blocked(trial.claim())
        await trial.blocked(trial.claim(None))
        await trial.outlast_lease()
        assert (await trial.claimed(trial.claim())).owner == "ours"

    async def test_one_of_many_concurrent_claims_is_granted(self, trial: Trial) -> None:
        """And all others are blocked by it."""
        answers = await _claim_at_once(trial, "task")
        granted = [answer.record for answer in answers if isinstance(answer, Claimed)]
        assert granted == [await trial.stored()]
        assert {answer.record for answer in answers} == set(granted)

    async def test_one_of_many_claims_from_many_event_loops_is_granted(self, trial: Trial) -> None:
        """One instance serves any number of threads and event loops."""
        threads = (to_thread.run_sync(_claim_on_a_loop_of_its_own, trial, f"thread {number}") for number in range(4))
        rounds = await asyncio.gather(*threads)
        answers = [answer for answers in rounds for answer in answers]
        assert [answer.record for answer in answers if isinstance(answer, Claimed)] == [await trial.stored()]

    async def test_clock_skew_is_added_to_a_foreign_lease_where_callers_judge(self, trial: Trial) -> None:
        """And changes nothing where the store has a clock."""
        await trial.claimed(trial.claim("theirs", kept_seconds=3 * KEPT_SECONDS))
        await trial.outlast_lease()
        answer = await trial.acquire(trial.claim("early"), max_clock_skew_seconds=LEASE_SECONDS)
        assert isinstance(answer, Blocked) == self.adds_clock_skew
        await trial.outlast_lease()
        assert isinstance(await trial.acquire(trial.claim(), max_clock_skew_seconds=LEASE_SECONDS), Claimed)

    async def test_instants_are_moved_to_the_clock_that_judges(self, trial: Trial) -> None:
        """A caller whose clock is ahead holds its claim no longer than others, unless callers judge."""
        ahead = trial.clock() + 3600
        await trial.layer.acquire(claim_of(trial.key, now=ahead, owner="theirs"), now=ahead)
        await trial.outlast_lease()
        assert isinstance(await trial.acquire(trial.claim()), Blocked) == self.adds_clock_skew

    async def test_keys_are_kept_apart(self, trial: Trial) -> None:
        """Also where one begins with the other, or differs in case."""
        keys = [trial.key, f"{trial.key} ", f"{trial.key}#", trial.key.upper(), f"{trial.key}é"]
        for key in keys:
            answer = await trial.layer.acquire(claim_of(key, now=trial.clock(), owner=key), now=trial.clock())
            assert isinstance(answer, Claimed)
        await trial.layer.forget(keys[0])
        owners = [record and record.owner for record in [await trial.layer.get(key) for key in keys]]
        assert owners == [None, *keys[1:]]


async def _claim_at_once(trial: Trial, name: str) -> list[Claimed | Blocked]:
    """Ask for a claim from many tasks of this loop at once."""
    claims = (trial.claim(f"{name} {number}") for number in range(CONCURRENT_CLAIMS))
    return await asyncio.gather(*(trial.acquire(claim) for claim in claims))


def _claim_on_a_loop_of_its_own(trial: Trial, name: str) -> list[Claimed | Blocked]:
    return asyncio.run(_claim_at_once(trial, name))
