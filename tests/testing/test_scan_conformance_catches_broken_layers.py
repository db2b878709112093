"""Negative controls of `scan` and `purge`: each layer breaks one promise, and exactly the tests of that one notice."""

from __future__ import annotations

import fnmatch
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from aidem._rules import lifecycle
from aidem._rules.record import DataRecord, RecordStatus
from aidem._runtime.cancellation import Immediate
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.testing import PurgeConformance, ScanConformance
from tests.support.controls import Controls

SCANS = Controls(ScanConformance)
PURGES = Controls(PurgeConformance)
PAGE = 100


class Scans(MemoryPersistenceLayer):
    """Hands out what `shown` says."""

    def shown(self, found: list[DataRecord], **options: Any) -> list[DataRecord]:
        raise NotImplementedError

    async def scan(self, **options: Any) -> AsyncGenerator[DataRecord]:
        found = [record async for record in super().scan(**options)]
        for record in self.shown(found, **options):
            yield record


@SCANS.breaks(
    "scan_finds_each_record_once_as_it_is_stored",
    "scan_finds_once_what_stays_while_other_records_come_and_go",
)
class ScansOnlyTheFirstPage(Scans):
    def shown(self, found: list[DataRecord], **options: Any) -> list[DataRecord]:
        return found[:PAGE]


@SCANS.breaks(
    "scan_finds_each_record_once_as_it_is_stored",
    "scan_finds_once_what_stays_while_other_records_come_and_go",
)
class ScansSomeTwice(Scans):
    def shown(self, found: list[DataRecord], **options: Any) -> list[DataRecord]:
        return found + found[PAGE:]


@SCANS.breaks("scan_finds_each_record_once_as_it_is_stored", "scan_without_a_prefix_finds_all_records")
class ScansWithoutNotes(Scans):
    def shown(self, found: list[DataRecord], **options: Any) -> list[DataRecord]:
        return [record.replace(note=None, fence=0) for record in found]


@SCANS.breaks("scan_without_a_prefix_finds_all_records")
class ScansNothingWithoutAPrefix(Scans):
    def shown(self, found: list[DataRecord], *, prefix: str = "", **options: Any) -> list[DataRecord]:
        return found if prefix else []


@SCANS.breaks("scan_takes_every_character_of_a_prefix_for_itself")
class TakesAPrefixForAPattern(MemoryPersistenceLayer):
    async def scan(self, *, prefix: str = "", **options: Any) -> AsyncGenerator[DataRecord]:
        async for record in super().scan(**options):
            if fnmatch.fnmatchcase(record.idempotency_key, f"{prefix}*"):
                yield record


@SCANS.breaks("scan_takes_every_character_of_a_prefix_for_itself")
class FoldsTheCaseOfAPrefix(MemoryPersistenceLayer):
    async def scan(self, *, prefix: str = "", **options: Any) -> AsyncGenerator[DataRecord]:
        async for record in super().scan(**options):
            if record.idempotency_key.lower().startswith(prefix.lower()):
                yield record


@SCANS.breaks("scan_finds_no_more_records_than_the_limit", "scan_finds_only_records_with_the_status")
class ScansEveryStatus(MemoryPersistenceLayer):
    def scan(self, *, status: RecordStatus | None = None, **options: Any) -> AsyncGenerator[DataRecord]:
        return super().scan(**options)


@SCANS.breaks("scan_finds_no_more_records_than_the_limit")
class ScansWithoutLimit(MemoryPersistenceLayer):
    def scan(self, *, limit: int | None = None, **options: Any) -> AsyncGenerator[DataRecord]:
        return super().scan(**options)


@SCANS.breaks("scan_finds_no_more_records_than_the_limit")
class LimitsWhatItLooksAt(MemoryPersistenceLayer):
    async def scan(self, *, status: RecordStatus | None = None, **options: Any) -> AsyncGenerator[DataRecord]:
        async for record in super().scan(**options):
            if status in {None, record.status}:
                yield record


@SCANS.breaks("scan_does_not_find_what_is_gone", "scan_may_be_left_early")
class ScansWhatIsGone(MemoryPersistenceLayer):
    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen = dict[str, DataRecord]()

    def forget(self, key: str) -> Immediate[None]:
        self.seen |= {key: record for key, record in [(key, self._records.get(key))] if record is not None}
        return super().forget(key)

    async def scan(self, *, prefix: str = "", **options: Any) -> AsyncGenerator[DataRecord]:
        async for record in super().scan(prefix=prefix, **options):
            yield record
        for key, record in self.seen.items():
            if key.startswith(prefix) and key not in self._records and not key.endswith("goes"):
                yield record


@SCANS.breaks("scan_finds_once_what_stays_while_other_records_come_and_go")
class ScansByPosition(MemoryPersistenceLayer):
    async def scan(self, *, prefix: str = "", **options: Any) -> AsyncGenerator[DataRecord]:
        position = 0
        while True:
            found = [record async for record in super().scan(prefix=prefix, **options)]
            found.sort(key=lambda record: record.idempotency_key)
            if position >= len(found):
                return
            yield found[position]
            position += 1


@SCANS.breaks("scan_may_be_left_early")
class ScansOneAtATime(MemoryPersistenceLayer):
    is_scanning = False

    async def scan(self, **options: Any) -> AsyncGenerator[DataRecord]:
        if self.is_scanning:
            raise RuntimeError("busy")
        self.is_scanning = True
        async for record in super().scan(**options):
            yield record
        self.is_scanning = False


@PURGES.breaks("purge_answers_how_many_records_it_has_removed", "purge_removes_what_has_expired_and_nothing_else")
class PurgesNothing(MemoryPersistenceLayer):
    def purge(self) -> Immediate[int]:
        return Immediate(0)


@PURGES.breaks("purge_removes_what_has_expired_and_nothing_else")
class PurgesASecondEarly(MemoryPersistenceLayer):
    def purge(self) -> Immediate[int]:
        before = len(self._records)
        now = self.clock() + 1
        self._records = {
            key: record for key, record in self._records.items() if not lifecycle.is_expired(record, now=now)
        }
        return Immediate(before - len(self._records))


@PURGES.breaks("purge_removes_what_has_expired_and_nothing_else")
class PurgesOnlyTheFirstPage(MemoryPersistenceLayer):
    def purge(self) -> Immediate[int]:
        now = self.clock()
        expired = [key for key, record in self._records.items() if lifecycle.is_expired(record, now=now)][:PAGE]
        for key in expired:
            del self._records[key]
        return Immediate(len(expired))


@PURGES.breaks("purge_removes_what_has_expired_and_nothing_else")
class PurgesEverything(MemoryPersistenceLayer):
    def purge(self) -> Immediate[int]:
        count = len(self._records)
        self._records.clear()
        return Immediate(count)


@PURGES.breaks("purge_answers_how_many_records_it_has_removed")
class CountsWhatIsLeft(MemoryPersistenceLayer):
    def purge(self) -> Immediate[int]:
        _ = super().purge()
        return Immediate(len(self._records))


# --- The runner -----------------------------------------------------------------------------------------------------

BROKEN = [(controls, layer_class) for controls in (SCANS, PURGES) for layer_class in controls.layers]


@pytest.mark.parametrize(("controls", "broken"), BROKEN, ids=[broken.__name__ for _, broken in BROKEN])
def test_exactly_the_tests_of_the_broken_promise_fail(controls: Controls, broken: type[MemoryPersistenceLayer]) -> None:
    assert controls.failures_of(broken) == controls.layers[broken]


@pytest.mark.parametrize("controls", [SCANS, PURGES], ids=["scan", "purge"])
def test_the_unbroken_layer_passes_and_every_test_of_the_suite_is_seen_to_fail(controls: Controls) -> None:
    assert controls.failures_of(MemoryPersistenceLayer) == set()
    assert set().union(*controls.layers.values()) == set(controls.tests)
