"""What each test of the conformance suite works with: one layer, one key, one clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from aidem._rules.lifecycle import Blocked, Claimed, milliseconds
from aidem._rules.record import DataRecord, OutcomeKind, RecordStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aidem.persistence import PersistenceLayer
    from aidem.testing._clock import FakeClock

LEASE_SECONDS: Final = 2
KEPT_SECONDS: Final = 4


def claim_of(
    key: str,
    *,
    now: float,
    owner: str | None = "ours",
    lease_seconds: int | None = LEASE_SECONDS,
    may_be_taken_over: bool = True,
    kept_seconds: int = KEPT_SECONDS,
    payload_hash: str = "",
    note: str | None = None,
) -> DataRecord:
    """Return a claim to propose, its instants counted from `now`."""
    lease_end = None if lease_seconds is None else milliseconds(now) + lease_seconds * 1000
    return DataRecord(
        idempotency_key=key,
        status=RecordStatus.INPROGRESS,
        expiry_timestamp=int(now) + kept_seconds,
        in_progress_expiry_timestamp=lease_end if may_be_taken_over else None,
        lease_expiry_timestamp=None if may_be_taken_over else lease_end,
        payload_hash=payload_hash,
        owner=owner,
        note=note,
    )


def completed_of(
    claimed: DataRecord,
    *,
    now: float,
    response_data: str = '{"paid": true}',
    outcome: OutcomeKind | None = None,
    kept_seconds: int = KEPT_SECONDS,
) -> DataRecord:
    """Return the completed record of a claim, its expiry counted from `now`."""
    return DataRecord(
        idempotency_key=claimed.idempotency_key,
        status=RecordStatus.COMPLETED,
        expiry_timestamp=int(now) + kept_seconds,
        response_data=response_data,
        outcome=outcome,
        payload_hash=claimed.payload_hash,
        owner=claimed.owner,
        fence=claimed.fence,
        note=claimed.note,
    )


def timeless(record: DataRecord | None) -> DataRecord | None:
    """Return the record without what the store decides: its instants, its fence, and where it is kept."""
    return record and record.replace(
        expiry_timestamp=None, in_progress_expiry_timestamp=None, lease_expiry_timestamp=None, fence=0, sort_key=None
    )


def kinds_of_instants(record: DataRecord | None) -> tuple[bool, bool, bool] | None:
    """Say which instants a record has."""
    return (
        None
        if record is None
        else (
            record.expiry_timestamp is not None,
            record.in_progress_expiry_timestamp is not None,
            record.lease_expiry_timestamp is not None,
        )
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One layer, one fresh key, one clock.

    Attributes:
        layer: The layer under test.
        key: A key that no other test uses.
        clock: The clock of the callers.
        wait: Lets so many seconds pass, for callers and layer alike.
        tolerance_seconds: How far the clock that judges may stray from `clock` meanwhile.
    """

    layer: PersistenceLayer
    key: str
    clock: FakeClock
    wait: Callable[[float], Awaitable[None]]
    tolerance_seconds: float

    # --- Time: each of these counts from the operation just before it -----------------------------------------------

    async def wait_until_lease_ends(self) -> None:
        """Let the last instant come at which a lease holds."""
        await self.wait(LEASE_SECONDS - self.tolerance_seconds)

    async def wait_until_expiry(self) -> None:
        """Let the last instant come at which a record counts."""
        await self.wait(KEPT_SECONDS + 0.999 - self.tolerance_seconds)

    async def wait_a_moment(self) -> None:
        """Let the smallest step of time pass by which the judgement must have changed."""
        await self.wait(0.001 + 2 * self.tolerance_seconds)

    async def outlast_lease(self) -> None:
        """Let a lease pass."""
        await self.wait_until_lease_ends()
        await self.wait_a_moment()

    async def outlast_expiry(self) -> None:
        """Let a record expire."""
        await self.wait_until_expiry()
        await self.wait_a_moment()

    # --- Operations, now --------------------------------------------------------------------------------------------

    def claim(  # what `claim_of` takes, of this key and now
        self,
        owner: str | None = "ours",
        *,
        lease_seconds: int | None = LEASE_SECONDS,
        may_be_taken_over: bool = True,
        kept_seconds: int = KEPT_SECONDS,
        payload_hash: str = "",
        note: str | None = None,
    ) -> DataRecord:
        """Return a claim to propose."""
        return claim_of(
            self.key,
            now=self.clock(),
            owner=owner,
            lease_seconds=lease_seconds,
            may_be_taken_over=may_be_taken_over,
            kept_seconds=kept_seconds,
            payload_hash=payload_hash,
            note=note,
        )

    async def acquire(self, record: DataRecord, *, max_clock_skew_seconds: float = 0.0) -> Claimed | Blocked:
        """Ask for a claim."""
        return await self.layer.acquire(record, now=self.clock(), max_clock_skew_seconds=max_clock_skew_seconds)

    async def claimed(self, record: DataRecord) -> DataRecord:
        """Ask for a claim that must be granted."""
        answer = await self.acquire(record)
        if isinstance(answer, Claimed):
            return answer.record
        raise AssertionError(f"this claim must be granted: {record}; it was blocked: {answer}")

    async def blocked(self, record: DataRecord) -> DataRecord:
        """Ask for a claim that must not be granted; the answer must hold the record found."""
        before = await self.stored()
        answer = await self.acquire(record)
        if isinstance(answer, Claimed):
            raise AssertionError(f"this claim must be blocked: {record}; it was granted: {answer}")  # noqa: TRY004
        if not answer.record == before == await self.stored():
            raise AssertionError(f"a claim that is blocked must answer the record found, {before}, not {answer.record}")
        return answer.record

    async def complete(self, claimed: DataRecord, response_data: str = '{"paid": true}') -> bool:
        """Store a result over a claim."""
        record = completed_of(claimed, now=self.clock(), response_data=response_data)
        return await self.layer.complete(record, now=self.clock())

    async def completed(self, claimed: DataRecord) -> DataRecord:
        """Store a result, which must be accepted; return what is stored then."""
        if not await self.complete(claimed):
            raise AssertionError(f"the owner of this claim must be able to complete it: {claimed}")
        stored = await self.stored()
        if stored is None:
            raise AssertionError(f"a completion that was accepted must be stored: {claimed}")
        return stored

    async def renew(self, record: DataRecord) -> DataRecord | None:
        """Set the instants of a claim."""
        return await self.layer.renew(record, now=self.clock())

    async def release(self, record: DataRecord) -> bool:
        """Give a claim back."""
        return await self.layer.release(record)

    async def stored(self) -> DataRecord | None:
        """Return what the layer holds under the key."""
        return await self.layer.get(self.key)
