"""The record: the one value that crosses the line between the engine and a persistence layer.

Names, units and number types are those of AWS Powertools for Python, so that two fleets can share a table.
"""

from __future__ import annotations

import datetime
import json
from enum import StrEnum
from typing import Any, NamedTuple, NoReturn


class RecordStatus(StrEnum):
    """What a record says about its key. `EXPIRED` is computed and never stored."""

    INPROGRESS = "INPROGRESS"
    COMPLETED = "COMPLETED"
    EXPIRED = "EXPIRED"


INPROGRESS, COMPLETED = RecordStatus.INPROGRESS, RecordStatus.COMPLETED
"""Names of their own for the hot path: to look a member up on its enum costs as much as a call."""


class OutcomeKind(StrEnum):
    """What a completed record holds instead of a result."""

    EXCEPTION = "exception"
    UNAVAILABLE = "unavailable"


class DataRecord(NamedTuple):
    """One idempotency record: immutable, compared by value. Fields may be added, so name them, also to make one.

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
        note: Text for operators, made from the payload and stored in clear; None: there is none.
    """

    # A tuple, since a call makes three: a frozen dataclass takes three times as long. `lifecycle` calls `__new__`:
    # the class would make a dict of the arguments first, which takes longer than all the rest.
    idempotency_key: str
    status: RecordStatus
    expiry_timestamp: int | None = None
    in_progress_expiry_timestamp: int | None = None
    lease_expiry_timestamp: int | None = None
    response_data: str | None = None
    outcome: OutcomeKind | None = None
    payload_hash: str = ""
    sort_key: str | None = None
    owner: str | None = None
    fence: int = 0
    note: str | None = None

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
        return self._replace(**changes)

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"a DataRecord is immutable; use record.replace({name}=...)")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"a DataRecord is immutable; cannot delete {name}")

    def __repr__(self) -> str:
        # The result itself stays out: reprs end up in logs.
        shown = (f"{name}={value!r}" for name, value in self._asdict().items() if name != "response_data")
        return f"DataRecord({', '.join(shown)})"
