"""The store: records and the operations on them, written from what is promised, not from `aidem._rules.lifecycle`."""

from __future__ import annotations

from math import ceil, floor
from typing import TYPE_CHECKING, Any

from aidem import DataRecord, RecordStatus
from aidem.persistence import Blocked, Claimed
from aidem.persistence.memory import MemoryPersistenceLayer
from tests.simulation.rules import Rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.simulation.world import World

EPOCH = 1_800_000_000.0


def is_given_up(record: DataRecord) -> bool:
    """Whether its owner left the claim in doubt."""
    return record.in_progress_expiry_timestamp is None and record.lease_expiry_timestamp == 0


def lease_end(record: DataRecord) -> float | None:
    """Return when a claim lapses or is in doubt, in epoch seconds; None: it holds until it expires."""
    end = record.in_progress_expiry_timestamp or record.lease_expiry_timestamp
    return None if end is None else end / 1000


def nearest(seconds: float) -> int:
    """Return the nearest whole number, of two the later one."""
    return floor(seconds + 0.5)


class Store:
    """Each call of a method is one atomic step; it judges by its own clock, or by that of whoever calls.

    With a clock of its own, every operation is done by `MemoryPersistenceLayer` as well, and the answers are compared.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.own_clock = world.conditions.own_clock
        self.records: dict[str, DataRecord] = {}
        self.owners: dict[tuple[str, int], str | None] = {}
        """Who got a fence of a key."""
        self.earlier_owners: dict[str | None, frozenset[str | None]] = {}
        self.last_fence: dict[str, int] = {}
        self.completions: list[tuple[float, DataRecord]] = []
        self.reference: MemoryPersistenceLayer | None = None
        if self.own_clock:
            self.reference = MemoryPersistenceLayer(clock=self.clock)

    def clock(self) -> float:
        return EPOCH + self.world.now

    # --- The operations -----------------------------------------------------------------------------------------------

    def acquire(self, record: DataRecord, *, now: float, skew: float) -> Claimed | Blocked:
        judge = self._judge(now)
        found = self._find(record.idempotency_key, judge)
        answer: Claimed | Blocked
        if found is None:
            answer = Claimed(self._claim(record, now))
        elif found.status is RecordStatus.INPROGRESS and found.owner == record.owner:
            answer = Claimed(found)
        elif self._has_lapsed(found, judge if self.own_clock else judge - skew):
            answer = Claimed(self._claim(record, now), taken_over=True)
            self.world.judge.took_over(found, answer.record)
        else:
            answer = Blocked(found, judge if self.own_clock else None)
        if self.reference is not None:
            self._compare("acquire", answer, self.reference.acquire(record, now=now).answer)
        return answer

    def take_over(
        self, found: DataRecord, record: DataRecord, *, now: float, skew: float, force: bool
    ) -> DataRecord | None:
        key, judge = record.idempotency_key, self._judge(now)
        stored = self._find(key, judge)
        is_found = stored is not None and (stored.owner, stored.fence) == (found.owner, found.fence)
        answer = None
        theirs = None if self.reference is None else self.reference.get(key).answer
        if stored is not None and stored.status is RecordStatus.INPROGRESS:
            end = lease_end(stored)
            has_passed = end is not None and int(end * 1000) < int((judge if self.own_clock else judge - skew) * 1000)
            if stored.owner == record.owner:
                answer = stored
            elif is_found and (has_passed or force):
                self.earlier_owners[record.owner] = self.owners_before(stored.owner)
                answer = self._claim(record, now, rounded=nearest)
                if not force:
                    self.world.judge.took_over(stored, answer, is_check=True)
        if self.reference is not None:
            named = theirs if is_found and theirs is not None else found.replace(owner="nobody", fence=-1)
            self._compare("take_over", answer, self.reference.take_over(named, record, now=now, force=force).answer)
        return answer

    def owners_before(self, owner: str | None) -> frozenset[str | None]:
        """Return the owner of a claim, and those whose claims were taken over one after another to check them."""
        return self.earlier_owners.get(owner, frozenset()) | {owner}

    def complete(self, record: DataRecord, *, now: float) -> bool:
        key = record.idempotency_key
        found = self._find(key, self._judge(now))
        is_stored = found is None or self._is_held(found, record)
        if is_stored:
            stored = self.records[key] = self._moved(record, now)
            self.completions.append((self.world.now, stored))
        answer = is_stored or (found is not None and _is_done_before(found, record))
        if self.reference is not None:
            self._compare("complete", answer, self.reference.complete(record, now=now).answer)
        return answer

    def renew(self, record: DataRecord, *, now: float) -> DataRecord | None:
        found = self.records.get(record.idempotency_key)
        answer = None
        if found is not None and self._is_held(found, record):
            answer = self._renewed(found, self._moved(record, now))
            if answer is not None:
                self.records[record.idempotency_key] = answer
        if self.reference is not None:
            self._compare("renew", answer, self.reference.renew(record, now=now).answer)
        return answer

    def release(self, record: DataRecord) -> bool:
        found = self.records.get(record.idempotency_key)
        answer = found is not None and self._is_held(found, record)
        if answer:
            del self.records[record.idempotency_key]
        if self.reference is not None:
            self._compare("release", answer, self.reference.release(record).answer)
        return answer

    def get(self, key: str) -> DataRecord | None:
        return self.records.get(key)

    # --- What they are made of ----------------------------------------------------------------------------------------

    def _judge(self, now: float) -> float:
        return self.clock() if self.own_clock else now

    def _find(self, key: str, judge: float) -> DataRecord | None:
        found = self.records.get(key)
        if found is not None and found.expiry_timestamp is not None and found.expiry_timestamp < int(judge):
            return None
        return found

    def _has_lapsed(self, found: DataRecord, judge: float) -> bool:
        end = found.in_progress_expiry_timestamp
        return found.status is RecordStatus.INPROGRESS and end is not None and end < int(judge * 1000)

    def _is_held(self, found: DataRecord, record: DataRecord) -> bool:
        return found.status is RecordStatus.INPROGRESS and record.owner is not None and found.owner == record.owner

    def _claim(self, record: DataRecord, now: float, *, rounded: Callable[[float], int] = ceil) -> DataRecord:
        key = record.idempotency_key
        fence = self._next_fence(self.records.get(key), key, now)
        self.last_fence[key] = fence
        self.owners[key, fence] = record.owner
        stored = self._moved(record, now, rounded=rounded).replace(
            fence=fence, status=RecordStatus.INPROGRESS, response_data=None, outcome=None
        )
        self.records[key] = stored
        return stored

    def _next_fence(self, old: DataRecord | None, key: str, now: float) -> int:
        fence = int(self._judge(now) * 1000) if old is None else old.fence + 1
        return max(fence, self.last_fence.get(key, 0) + 1)

    def _renewed(self, found: DataRecord, moved: DataRecord) -> DataRecord | None:
        if not is_given_up(moved):
            if is_given_up(found):
                return None
            if _held_until(moved) < _held_until(found):
                return found  # it is applied after its successors
        return found.replace(
            expiry_timestamp=moved.expiry_timestamp,
            in_progress_expiry_timestamp=moved.in_progress_expiry_timestamp,
            lease_expiry_timestamp=moved.lease_expiry_timestamp,
        )

    def _moved(self, record: DataRecord, now: float, *, rounded: Callable[[float], int] = ceil) -> DataRecord:
        """Return the record with its instants by the clock that judges; the expiry moves by whole seconds."""
        delta = int((self._judge(now) - now) * 1000)
        if delta == 0:
            return record
        in_progress, lease, expiry = (
            record.in_progress_expiry_timestamp,
            record.lease_expiry_timestamp,
            record.expiry_timestamp,
        )
        return record.replace(
            in_progress_expiry_timestamp=None if in_progress is None else in_progress + delta,
            lease_expiry_timestamp=lease + delta if lease else lease,  # 0 is no instant
            expiry_timestamp=None if expiry is None else expiry + rounded(delta / 1000),
        )

    def _compare(self, operation: str, ours: Any, theirs: Any) -> None:
        """Compare kind, owner, status and outcome of two answers."""
        if _gist(ours) != _gist(theirs):
            text = f"MemoryPersistenceLayer.{operation} answers {theirs}, and the store of the simulation {ours}"
            self.world.violate(Rule.H10, text)


def _held_until(record: DataRecord) -> float:
    end = lease_end(record)
    return float(record.expiry_timestamp or 0) if end is None else end


def _is_done_before(found: DataRecord, record: DataRecord) -> bool:
    """Whether an earlier try of a completion was applied."""
    return (
        record.owner is not None
        and found.owner == record.owner
        and found.status is RecordStatus.COMPLETED
        and found.response_data == record.response_data
        and found.outcome == record.outcome
    )


def _gist(answer: Any) -> object:
    if isinstance(answer, Claimed | Blocked):
        return type(answer), _gist(answer.record)
    if isinstance(answer, DataRecord):
        return answer.owner, answer.status, answer.response_data, answer.outcome, answer.payload_hash
    return answer
