"""A record as JSON text, and what the scripts are given of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final, cast

from aidem._rules import lifecycle
from aidem._rules.canonical_json import decode
from aidem._rules.record import DataRecord, OutcomeKind, RecordStatus
from aidem.persistence._errors import unknown_state
from aidem.persistence._stored import text
from aidem.persistence.redis._scripts import GIVEN_UP

if TYPE_CHECKING:
    from collections.abc import Callable

    from aidem.persistence.redis._scripts import AttributeNames

_quote: Final = json.encoder.encode_basestring_ascii


class RecordText:
    """Writes and reads records with certain attribute names."""

    def __init__(self, names: AttributeNames) -> None:
        self._names = names
        self._status, self._validation, self._owner, self._note, self._fence, self._data, self._outcome = (
            f"{json.dumps(name)}: "
            for name in (
                names.status,
                names.validation_key,
                names.owner,
                names.note,
                names.fence,
                names.data,
                names.outcome,
            )
        )

    # --- What scripts are given -------------------------------------------------------------------------------------

    def claim(self, record: DataRecord) -> str:
        """Return what follows the instants of a claim, up to its fence."""
        return f"{self._head(record)}{self._fence}"

    def outcome(self, record: DataRecord) -> str:
        """Return what follows the instants of an outcome."""
        parts = [f"{self._head(record)}{self._fence}{record.fence}"]
        if record.response_data is not None:
            parts.append(f"{self._data}{_quote(record.response_data)}")
        if record.outcome is not None:
            parts.append(f"{self._outcome}{_quote(record.outcome.value)}")
        return ", ".join(parts) + "}"

    def _head(self, record: DataRecord) -> str:
        head = f'{self._status}"{record.status}", '
        if record.payload_hash:
            head += f"{self._validation}{_quote(record.payload_hash)}, "
        if record.owner is not None:
            head += f"{self._owner}{_quote(record.owner)}, "
        if record.note is not None:
            head += f"{self._note}{_quote(record.note)}, "
        return head

    # --- What is stored ---------------------------------------------------------------------------------------------

    def read(self, key: str, stored: bytes | None) -> DataRecord | None:
        """Return the record of a key; None where there is none, or only a text that counts as none.

        Raises:
            IdempotencyInvalidStatusError: It has a status or an outcome that aidem does not know.
        """
        try:
            fields: Any = None if stored is None else decode(stored.decode())
        except (ValueError, RecursionError):
            return None
        if not isinstance(fields, dict):
            return None
        get = cast("dict[str, Any]", fields).get
        status = get(self._names.status)
        return self._record(key, status, get) if isinstance(status, str) else None

    def _record(self, key: str, status: str, get: Callable[[str], Any]) -> DataRecord:
        names = self._names
        outcome = get(names.outcome)
        try:
            return DataRecord(
                idempotency_key=key,
                status=RecordStatus(status),
                expiry_timestamp=_whole(get(names.expiry)),
                in_progress_expiry_timestamp=_whole(get(names.in_progress_expiry)),
                lease_expiry_timestamp=_whole(get(names.lease_expiry)),
                response_data=text(get(names.data)),
                outcome=None if outcome is None else OutcomeKind(outcome),
                payload_hash=text(get(names.validation_key)) or "",
                owner=text(get(names.owner)),
                fence=_whole(get(names.fence)) or 0,
                note=text(get(names.note)),
            )
        except ValueError as error:
            raise unknown_state(key, status=status, outcome=outcome) from error


def durations(
    record: DataRecord, *, now: float, to_nearest_second: bool = False
) -> tuple[str | int, str | int, str | int]:
    """Return how many milliseconds after `now` its expiry, its in-progress expiry and its lease expiry come.

    The store rounds its expiry up to a second, or with `to_nearest_second` to the nearest one. The last one is
    `GIVEN_UP` where the record is.
    """
    start = lifecycle.milliseconds(now)
    expiry, in_progress, lease = (
        record.expiry_timestamp,
        record.in_progress_expiry_timestamp,
        record.lease_expiry_timestamp,
    )
    return (
        "" if expiry is None else expiry * 1000 - start - lifecycle.HALF_A_SECOND * to_nearest_second,
        "" if in_progress is None else in_progress - start,
        "" if lease is None else GIVEN_UP if lease == lifecycle.GIVEN_UP else lease - start,
    )


def _whole(value: object) -> int | None:
    """Return a number as an int; other libraries write digit strings and floats too, and what is no number is left."""
    if isinstance(value, int):
        return value
    if isinstance(value, float | str):
        try:
            return int(float(value)) if isinstance(value, float) or not value.isdecimal() else int(value)
        except (ValueError, OverflowError):
            return None
    return None
