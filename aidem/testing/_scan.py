"""The contracts of `aidem.persistence.SupportsScan` and `SupportsPurge` as tests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Final

from aidem._rules.record import RecordStatus
from aidem.persistence import SupportsPurge, SupportsScan
from aidem.testing._conformance import PersistenceLayerConformance
from aidem.testing._trial import KEPT_SECONDS, Trial, claim_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aidem._rules.record import DataRecord

SPECIAL: Final = ("*", "?", "[a]", "[^a]", "\\", "%", "_", "'", '"', "{x}", "é", " ")
"""What a store may take for a pattern or for syntax."""

MORE_THAN_A_PAGE: Final = 230
AT_ONCE: Final = 20


class ScanConformance(PersistenceLayerConformance):
    """Proves that a layer keeps the contract, `scan` included; see `PersistenceLayerConformance`."""

    async def test_scan_finds_each_record_once_as_it_is_stored(self, trial: Trial) -> None:
        """Claims and outcomes, more of them than a page holds."""
        keys = [f"{trial.key}/{number}" for number in range(MORE_THAN_A_PAGE)]
        await _store(trial, keys)
        completed = (await trial.layer.get(keys[0]) or trial.claim()).replace(
            status=RecordStatus.COMPLETED, in_progress_expiry_timestamp=None, response_data="1"
        )
        assert await trial.layer.complete(completed, now=trial.clock())
        found = await _found(trial, prefix=trial.key)
        assert sorted(record.idempotency_key for record in found) == sorted(keys)
        assert {record for record in found if record.idempotency_key in keys[:2]} == {
            await trial.layer.get(key) for key in keys[:2]
        }

    async def test_scan_without_a_prefix_finds_all_records(self, trial: Trial) -> None:
        """Ours among them, once."""
        claimed = await trial.claimed(trial.claim())
        found = [record for record in await _found(trial) if record.idempotency_key == trial.key]
        assert found == [claimed]

    async def test_scan_takes_every_character_of_a_prefix_for_itself(self, trial: Trial) -> None:
        """None of them stands for others, nor for its other case."""
        prefixes = [f"{trial.key}{special}" for special in SPECIAL]
        await _store(trial, [f"{prefix}1" for prefix in prefixes] + [f"{trial.key}a1", f"{prefixes[0]}1".upper()])
        for prefix in prefixes:
            assert [record.idempotency_key for record in await _found(trial, prefix=prefix)] == [f"{prefix}1"]
        assert await _found(trial, prefix=f"{trial.key}b") == []

    async def test_scan_finds_only_records_with_the_status(self, trial: Trial) -> None:
        """Or with any, where none is asked for."""
        await trial.claimed(claim_of(f"{trial.key}/claim", now=trial.clock()))
        claimed = await trial.claimed(trial.claim())
        await trial.completed(claimed)
        for status, keys in {
            RecordStatus.INPROGRESS: {f"{trial.key}/claim"},
            RecordStatus.COMPLETED: {trial.key},
            None: {trial.key, f"{trial.key}/claim"},
        }.items():
            found = await _found(trial, prefix=trial.key, status=status)
            assert {record.idempotency_key for record in found} == keys

    async def test_scan_finds_no_more_records_than_the_limit(self, trial: Trial) -> None:
        """Of those that are asked for."""
        await _store(trial, [f"{trial.key}/{number}" for number in range(3)])
        await trial.completed(await trial.claimed(trial.claim()))
        for limit, count in {0: 0, 1: 1, 3: 3, 4: 4, 5: 4}.items():
            assert len(await _found(trial, prefix=trial.key, limit=limit)) == count
        completed = await _found(trial, prefix=trial.key, status=RecordStatus.COMPLETED, limit=1)
        assert [record.idempotency_key for record in completed] == [trial.key]

    async def test_scan_does_not_find_what_is_gone(self, trial: Trial) -> None:
        """Released or dropped."""
        keys = [f"{trial.key}/{number}" for number in range(3)]
        await _store(trial, keys)
        await trial.layer.forget(keys[0])
        await trial.release(await trial.layer.get(keys[1]) or trial.claim())
        assert [record.idempotency_key for record in await _found(trial, prefix=trial.key)] == [keys[2]]

    async def test_scan_finds_once_what_stays_while_other_records_come_and_go(self, trial: Trial) -> None:
        """Between any two records."""
        stays = [f"{trial.key}/{number}/stays" for number in range(MORE_THAN_A_PAGE)]
        goes = [f"{trial.key}/{number}/goes" for number in range(AT_ONCE)]
        await _store(trial, stays + goes)
        found = list[str]()
        async for record in _scan(trial, prefix=trial.key):
            found.append(record.idempotency_key)
            if goes:
                await trial.layer.forget(goes.pop(0))
                await _store(trial, [f"{trial.key}/new/{len(goes)}/comes"])
        assert sorted(key for key in found if key.endswith("stays")) == sorted(stays)
        assert len(found) == len({*found})

    async def test_scan_may_be_left_early(self, trial: Trial) -> None:
        """Other operations and scans go on."""
        await _store(trial, [f"{trial.key}/{number}" for number in range(3)])
        first = await anext(_scan(trial, prefix=trial.key))
        await trial.layer.forget(first.idempotency_key)
        assert len(await _found(trial, prefix=trial.key)) == 2  # noqa: PLR2004 - of three


class PurgeConformance(PersistenceLayerConformance):
    """Proves that a layer keeps the contract, `purge` included; see `PersistenceLayerConformance`."""

    async def test_purge_removes_what_has_expired_and_nothing_else(self, trial: Trial) -> None:
        """More than a page of it; in its last second a record still counts."""
        keys = [f"{trial.key}/{number}" for number in range(MORE_THAN_A_PAGE)]
        await _store(trial, keys)
        await trial.wait_until_expiry()
        await _purged(trial)
        assert await trial.layer.get(keys[-1]) is not None
        await trial.wait_a_moment()
        lives = await trial.claimed(trial.claim())
        assert await _purged(trial) <= MORE_THAN_A_PAGE
        assert [await trial.layer.get(key) for key in keys] == [None] * len(keys)
        assert await trial.stored() == lives

    async def test_purge_answers_how_many_records_it_has_removed(self, trial: Trial) -> None:
        """Of which nothing is left to count."""
        await trial.claimed(trial.claim(kept_seconds=2 * KEPT_SECONDS))
        await _purged(trial)
        await _store(trial, [f"{trial.key}/{number}" for number in range(3)])
        await trial.outlast_expiry()
        assert await _purged(trial) >= 1
        assert await _purged(trial) == 0


async def _store(trial: Trial, keys: list[str]) -> None:
    """Store a claim for each key, some of them at once."""
    now = trial.clock()
    for start in range(0, len(keys), AT_ONCE):
        claims = (claim_of(key, now=now, note=key) for key in keys[start : start + AT_ONCE])
        await asyncio.gather(*(trial.acquire(claim) for claim in claims))


def _scan(trial: Trial, **options: Any) -> AsyncIterator[DataRecord]:
    layer = trial.layer
    assert isinstance(layer, SupportsScan), f"{type(layer).__name__} has no scan"
    return layer.scan(**options)


async def _found(trial: Trial, **options: Any) -> list[DataRecord]:
    return [record async for record in _scan(trial, **options)]


async def _purged(trial: Trial) -> int:
    layer = trial.layer
    assert isinstance(layer, SupportsPurge), f"{type(layer).__name__} has no purge"
    return await layer.purge()
