"""The record: the one value that crosses the line between the engine and a persistence layer.

Names, units and number types are those of AWS Powertools for Python, so that two fleets can share a table.
"""

from __future__ import annotations

import datetime
import json
from enum import StrEnum
from typing import Any, NoReturn, Self


class RecordStatus(StrEnum):
    """What a record says about its key. `EXPIRED` is computed and never stored."""

    INPROGRESS = "INPROGRESS"
    COMPLETED = "COMPLETED"
    EXPIRED = "EXPIRED"


class OutcomeKind(StrEnum):
    """What a completed record holds instead of a result."""

    EXCEPTION = "exception"
    UNAVAILABLE = "unavailable"


class _Fields:
    """The fields of a record that is being filled."""

    __slots__ = (
        "expiry_timestamp",
        "fence",
        "idempotency_key",
        "in_progress_expiry_timestamp",
        "lease_expiry_timestamp",
        "note",
        "outcome",
        "owner",
        "payload_hash",
        "response_data",
        "sort_key",
        "status",
    )

    idempotency_key: str
    status: RecordStatus
    expiry_timestamp: int | None
    in_progress_expiry_timestamp: int | None
    lease_expiry_timestamp: int | None
    response_data: str | None
    outcome: OutcomeKind | None
    payload_hash: str
    sort_key: str | None
    owner: str | None
    fence: int
    note: str | None


class DataRecord(_Fields):
    """One idempotency record: immutable, compared by value.

    Attributes:
        idempotency_key: Prefix, `#` and hash.
        status: `INPROGRESS` or `COMPLETED`.
        expiry_timestamp: Epoch seconds after which the record counts as absent; None: never.
        in_progress_expiry_timestamp: Epoch milliseconds after which another caller may take over; None: never.
        lease_expiry_timestamp: Epoch milliseconds at which a claim that nobody may take over becomes in doubt; 0: its
            owner left it in doubt.
        response_data: The stored text of the outcome; None while there is none.
        outcome: None for a result, else an `OutcomeKind`.
        payload_hash: Hash of the validated part of the payload; `""`: not validated.
        sort_key: The sort key of a composite key, where the store has one.
        owner: Random token of the claim; None: written by another library.
        fence: Grows with every new claim of the key; 0: written by another library.
        note: Text for operators that the config made from the payload, stored in clear; None: there is none.
    """

    __slots__ = ()

    def __new__(
        cls,
        *,
        idempotency_key: str,
        status: RecordStatus,
        expiry_timestamp: int | None = None,
        in_progress_expiry_timestamp: int | None = None,
        lease_expiry_timestamp: int | None = None,
        response_data: str | None = None,
        outcome: OutcomeKind | None = None,
        payload_hash: str = "",
        sort_key: str | None = None,
        owner: str | None = None,
        fence: int = 0,
        note: str | None = None,
    ) -> Self:
        # Filled first, then frozen: a frozen dataclass takes three times as long to build, and a call builds three.
        fields = _Fields()
        fields.idempotency_key = idempotency_key
        fields.status = status
        fields.expiry_timestamp = expiry_timestamp
        fields.in_progress_expiry_timestamp = in_progress_expiry_timestamp
        fields.lease_expiry_timestamp = lease_expiry_timestamp
        fields.response_data = response_data
        fields.outcome = outcome
        fields.payload_hash = payload_hash
        fields.sort_key = sort_key
        fields.owner = owner
        fields.fence = fence
        fields.note = note
        record: Any = fields
        record.__class__ = cls
        return record  # type: ignore[no-any-return] # it is one now

    @property
    def is_expired(self) -> bool:
        """Whether the record has expired by this machine's clock: a convenience for users, no rule of aidem asks it."""
        now = datetime.datetime.now(tz=datetime.UTC).timestamp()
        return self.expiry_timestamp is not None and self.expiry_timestamp < int(now)

    def get_expiration_datetime(self) -> datetime.datetime | None:
        """Return the expiry as an aware datetime in UTC, or None for a record that never expires."""
        if self.expiry_timestamp is None:
            return None
        return datetime.datetime.fromtimestamp(self.expiry_timestamp, tz=datetime.UTC)

    def response_json_as_dict(self) -> Any:
        """Return the stored result, decoded from JSON; None where no result is stored."""
        if self.outcome is not None or not self.response_data:
            return None
        return json.loads(self.response_data)

    def replace(self, **changes: Any) -> DataRecord:
        """Return a copy with some fields changed."""
        return DataRecord(**{name: getattr(self, name) for name in _Fields.__slots__} | changes)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        message = f"a DataRecord is immutable; use record.replace({name}=...)"
        raise AttributeError(message)

    def __delattr__(self, name: str) -> NoReturn:
        message = f"a DataRecord is immutable; cannot delete {name}"
        raise AttributeError(message)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, DataRecord):
            return NotImplemented
        return _values(self) == _values(other)

    def __hash__(self) -> int:
        return hash(_values(self))

    def __repr__(self) -> str:
        # The result itself stays out: reprs end up in logs.
        shown = (f"{name}={getattr(self, name)!r}" for name in _Fields.__slots__ if name != "response_data")
        return f"DataRecord({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, ({name: getattr(self, name) for name in _Fields.__slots__},))


def _values(record: DataRecord) -> tuple[object, ...]:
    return tuple(getattr(record, name) for name in _Fields.__slots__)


def _restore(fields: dict[str, Any]) -> DataRecord:
    return DataRecord(**fields)
