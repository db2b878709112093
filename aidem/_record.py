"""The record: the one value that crosses the line between the engine and a persistence layer.

Names, units and number types are those of AWS Powertools for Python, so that two fleets can share a table.
"""

from __future__ import annotations

import datetime
import json
from enum import StrEnum
from typing import Any, NoReturn


class RecordStatus(StrEnum):
    """What a record says about its key. `EXPIRED` is computed and never stored."""

    INPROGRESS = "INPROGRESS"
    COMPLETED = "COMPLETED"
    EXPIRED = "EXPIRED"


class OutcomeKind(StrEnum):
    """What a completed record holds instead of a result."""

    EXCEPTION = "exception"
    UNAVAILABLE = "unavailable"


class DataRecord:
    """One idempotency record: immutable, compared by value.

    Attributes:
        idempotency_key: Prefix, `#` and hash.
        status: `INPROGRESS` or `COMPLETED`.
        expiry_timestamp: Epoch seconds after which the record counts as absent; None: never.
        in_progress_expiry_timestamp: Epoch milliseconds after which another caller may take over; None: never.
        lease_expiry_timestamp: Epoch milliseconds at which a claim that nobody may take over becomes in doubt.
        response_data: The stored text of the outcome; None while there is none.
        outcome: None for a result, else an `OutcomeKind`.
        payload_hash: Hash of the validated part of the payload; `""`: not validated.
        sort_key: The sort key of a composite key, where the store has one.
        owner: Random token of the claim; None: written by another library.
        fence: Grows with every new claim of the key; 0: written by another library.
    """

    # A plain slotted class: a frozen dataclass of eleven fields takes twice as long to build, and a call builds three.
    __slots__ = (
        "expiry_timestamp",
        "fence",
        "idempotency_key",
        "in_progress_expiry_timestamp",
        "lease_expiry_timestamp",
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

    def __init__(
        self,
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
    ) -> None:
        _set_idempotency_key(self, idempotency_key)
        _set_status(self, status)
        _set_expiry_timestamp(self, expiry_timestamp)
        _set_in_progress_expiry_timestamp(self, in_progress_expiry_timestamp)
        _set_lease_expiry_timestamp(self, lease_expiry_timestamp)
        _set_response_data(self, response_data)
        _set_outcome(self, outcome)
        _set_payload_hash(self, payload_hash)
        _set_sort_key(self, sort_key)
        _set_owner(self, owner)
        _set_fence(self, fence)

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
        return DataRecord(**{name: getattr(self, name) for name in self.__slots__} | changes)

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
        shown = (f"{name}={getattr(self, name)!r}" for name in self.__slots__ if name != "response_data")
        return f"DataRecord({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (_restore, ({name: getattr(self, name) for name in self.__slots__},))


def _values(record: DataRecord) -> tuple[object, ...]:
    return tuple(getattr(record, name) for name in DataRecord.__slots__)


def _restore(fields: dict[str, Any]) -> DataRecord:
    return DataRecord(**fields)


def _setter(name: str) -> Any:
    return vars(DataRecord)[name].__set__


_set_idempotency_key = _setter("idempotency_key")
_set_status = _setter("status")
_set_expiry_timestamp = _setter("expiry_timestamp")
_set_in_progress_expiry_timestamp = _setter("in_progress_expiry_timestamp")
_set_lease_expiry_timestamp = _setter("lease_expiry_timestamp")
_set_response_data = _setter("response_data")
_set_outcome = _setter("outcome")
_set_payload_hash = _setter("payload_hash")
_set_sort_key = _setter("sort_key")
_set_owner = _setter("owner")
_set_fence = _setter("fence")
