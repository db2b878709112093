"""Items of a DynamoDB table and the records they stand for, under configurable attribute names."""

from __future__ import annotations

from dataclasses import dataclass, fields
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from aidem._rules.record import DataRecord, OutcomeKind, RecordStatus
from aidem.exceptions import IdempotencyInvalidStatusError
from aidem.persistence._stored import NOT_A_TEXT, check_names, text

if TYPE_CHECKING:
    from collections.abc import Mapping

Item: TypeAlias = "dict[str, dict[str, Any]]"
"""Attributes as they are on the wire: by name, each a dict of its type and its value."""

_ABSENT: Final[dict[str, Any]] = {"NULL": True}

NUMBERS: Final = ("expiry", "in_progress_expiry", "lease_expiry", "fence")


@dataclass(frozen=True, slots=True, kw_only=True)
class Attributes:
    """The names of a table's attributes, by what they hold.

    Attributes:
        key: The partition key.
        sort_key: The sort key of a composite key; None: the key is simple.
        static_pk_value: The partition value of every record under a composite key.
    """

    key: str
    sort_key: str | None
    static_pk_value: str
    expiry: str
    in_progress_expiry: str
    lease_expiry: str
    status: str
    data: str
    validation: str
    owner: str
    fence: str
    outcome: str
    note: str

    def __post_init__(self) -> None:
        names = [getattr(self, field.name) for field in fields(self) if field.name != "static_pk_value"]
        check_names([name for name in names if name is not None])

    def primary_key(self, key: str) -> Item:
        """Return the attributes that name the item of an idempotency key."""
        if self.sort_key is None:
            return {self.key: {"S": key}}
        return {self.key: {"S": self.static_pk_value}, self.sort_key: {"S": key}}

    def key_of(self, item: Item) -> str:
        """Return the idempotency key that names an item."""
        return str(item[self.key if self.sort_key is None else self.sort_key]["S"])

    def record_of(self, key: str, item: Item) -> DataRecord:
        """Return the record that an item holds.

        Raises:
            IdempotencyInvalidStatusError: It is no record, or one that a later version of aidem has written.
        """
        status, outcome = _text(item, self.status), _text(item, self.outcome)
        try:
            return DataRecord(
                idempotency_key=key,
                status=RecordStatus(status or ""),
                expiry_timestamp=_number(item, self.expiry),
                in_progress_expiry_timestamp=_number(item, self.in_progress_expiry),
                lease_expiry_timestamp=_number(item, self.lease_expiry),
                response_data=_text(item, self.data),
                outcome=None if outcome is None else OutcomeKind(outcome),
                payload_hash=_text(item, self.validation) or "",
                sort_key=None if self.sort_key is None else key,
                owner=_text(item, self.owner),
                fence=_number(item, self.fence) or 0,
                note=_text(item, self.note),
            )
        except (ValueError, ArithmeticError) as error:
            raise IdempotencyInvalidStatusError(
                f"the item of idempotency key {key!r} has status {status!r} and outcome {outcome!r}, or instants that "
                "are no numbers, which this aidem cannot read; upgrade aidem, check the attribute names, "
                "or drop the record with forget(key)",
                key=key,
            ) from error


def values_of(record: DataRecord) -> dict[str, dict[str, str]]:
    """Return what a record stores beside its key, by what it holds; what is None, or no hash, is left out."""
    values: Mapping[str, str | int | None] = {
        "expiry": record.expiry_timestamp,
        "in_progress_expiry": record.in_progress_expiry_timestamp,
        "lease_expiry": record.lease_expiry_timestamp,
        "status": record.status,
        "data": record.response_data,
        "validation": record.payload_hash or None,
        "owner": record.owner,
        "fence": record.fence,
        "outcome": record.outcome,
        "note": record.note,
    }
    return {
        name: number(value) if name in NUMBERS else {"S": str(value)}
        for name, value in values.items()
        if value is not None
    }


def number(value: object) -> dict[str, str]:
    """Return a number as DynamoDB takes it."""
    return {"N": str(value)}


def _text(item: Item, name: str) -> str | None:
    """Return a text; an attribute of another type than S is none, but for NULL, which is no attribute."""
    ((kind, value),) = item.get(name, _ABSENT).items()
    return None if kind == "NULL" else text(value) if kind == "S" else NOT_A_TEXT


def _number(item: Item, name: str) -> int | None:
    """Return a number that some library may have stored as a fraction or as text."""
    ((kind, value),) = item.get(name, _ABSENT).items()
    if kind == "NULL":
        return None
    if kind not in {"N", "S"}:
        raise ValueError
    try:
        return int(value)
    except ValueError:
        return int(Decimal(value))
