"""What is asked of DynamoDB: one request an operation, whose condition mirrors the rules of `aidem._rules.lifecycle`.

Names never stand in an expression themselves, only placeholders: half of them are reserved words, and all of them are
the user's to choose.
https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Expressions.OperatorsAndFunctions.html
"""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from aidem._rules.lifecycle import held_until, is_given_up, milliseconds
from aidem._rules.record import RecordStatus
from aidem.persistence.dynamodb._items import number, values_of

if TYPE_CHECKING:
    from collections.abc import Iterable

    from aidem._rules.record import DataRecord
    from aidem.persistence.dynamodb._items import Attributes

Request: TypeAlias = "dict[str, Any]"

HELD: Final = frozenset({"expiry", "in_progress_expiry", "lease_expiry"})
"""What a renewal writes."""

STORED: Final = HELD | {"status", "data", "validation", "owner", "fence", "outcome", "note"}
"""What a claim or an outcome writes, or removes where it has none: nothing of an earlier record is left."""

OURS: Final = "#owner = :owner AND #status = :inprogress"
ABSENT: Final = "attribute_not_exists(#key) OR #expiry < :now_seconds"
LAPSED: Final = (
    "#status = :status AND attribute_exists(#in_progress_expiry) AND #in_progress_expiry < :lapse_milliseconds"
)
LEASE_PASSED: Final = (
    "(#in_progress_expiry < :lapse_milliseconds OR "
    "(attribute_not_exists(#in_progress_expiry) AND #lease_expiry < :lapse_milliseconds))"
)
NOT_EXPIRED: Final = "(attribute_not_exists(#expiry) OR #expiry >= :now_seconds)"
HELD_NO_LONGER: Final = (  # than this renewal holds it; what is given up, and ends at 0, is not held
    "#in_progress_expiry <= :held_until OR (attribute_not_exists(#in_progress_expiry) AND "
    "(#lease_expiry BETWEEN :one AND :held_until OR "
    "(attribute_not_exists(#lease_expiry) AND #expiry <= :held_until_seconds)))"
)
NEXT_FENCE: Final = "#fence = if_not_exists(#fence, :fence) + :one"

FOREVER_MILLISECONDS: Final = 10**18  # DynamoDB knows no infinity

_INPROGRESS: Final = {"S": RecordStatus.INPROGRESS.value}


class Requests:
    """Builds the requests to one table."""

    def __init__(self, table_name: str, attributes: Attributes) -> None:
        self.table_name = table_name
        self.attributes = attributes

    def claim(self, record: DataRecord, *, now: float, max_clock_skew_seconds: float, last_fence: int) -> Request:
        """Return the UpdateItem that stores a claim unless a live record is there; its fence is above the last one.

        A claim of our own is not taken over though it has lapsed: its reply was lost, and it is answered as found.
        """
        values = values_of(record)
        del values["fence"]
        parameters = {
            ":one": number(1),
            ":fence": number(max(milliseconds(now), last_fence)),
            ":now_seconds": number(int(now)),
            ":lapse_milliseconds": number(milliseconds(now - max_clock_skew_seconds)),
        }
        lapsed = LAPSED if record.owner is None else f"{LAPSED} AND NOT #owner = :owner"
        request = self._update(
            record, values, parameters, condition=f"{ABSENT} OR ({lapsed})", fields=STORED - {"fence"}, first=NEXT_FENCE
        )
        request["ReturnValues"] = "ALL_NEW"
        return request

    def take_over(
        self, found: DataRecord, record: DataRecord, *, now: float, max_clock_skew_seconds: float, force: bool
    ) -> Request:
        """Return the UpdateItem that stores a claim in the place of the one found."""
        values = values_of(record)
        del values["fence"]
        parameters = {
            ":one": number(1),
            ":fence": number(milliseconds(now)),
            ":now_seconds": number(int(now)),
        }
        conditions = ["#status = :status", NOT_EXPIRED]
        if found.owner is None:
            conditions.append("attribute_not_exists(#owner)")
        else:
            conditions.append("#owner = :found_owner")
            parameters[":found_owner"] = {"S": found.owner}
        if found.fence:
            conditions.append("#fence = :found_fence")
            parameters[":found_fence"] = number(found.fence)
        else:
            conditions.append("attribute_not_exists(#fence)")
        if not force:
            conditions.append(LEASE_PASSED)
            parameters[":lapse_milliseconds"] = number(milliseconds(now - max_clock_skew_seconds))
        request = self._update(
            record, values, parameters, condition=" AND ".join(conditions), fields=STORED - {"fence"}, first=NEXT_FENCE
        )
        request["ReturnValues"] = "ALL_NEW"
        return request

    def complete(self, record: DataRecord, *, now: float) -> Request:
        """Return the UpdateItem that stores an outcome over our claim, or where no record counts."""
        parameters = {":now_seconds": number(int(now))}
        condition = ABSENT
        if record.owner is not None:
            condition = f"{ABSENT} OR ({OURS})"
            parameters[":inprogress"] = _INPROGRESS
        return self._update(record, values_of(record), parameters, condition=condition, fields=STORED)

    def complete_ours(self, record: DataRecord) -> Request:
        """Return the Update of a transaction that stores an outcome over our claim, and fails where that is not."""
        request = self._update(record, values_of(record), {":inprogress": _INPROGRESS}, condition=OURS, fields=STORED)
        del request["ReturnValuesOnConditionCheckFailure"]  # it would show the caller what somebody else has stored
        return request

    def renew(self, record: DataRecord) -> Request:
        """Return the UpdateItem that moves the instants of our claim forward, or gives it up."""
        values = {name: value for name, value in values_of(record).items() if name in HELD}
        parameters = {":owner": {"S": record.owner}, ":inprogress": _INPROGRESS}
        condition = OURS
        if not is_given_up(record):
            condition = f"{OURS} AND ({HELD_NO_LONGER})"
            until = min(held_until(record), FOREVER_MILLISECONDS)
            parameters |= {
                ":one": number(1),
                ":held_until": number(int(until)),
                ":held_until_seconds": number(int(until // 1000) - 1),  # an expiry holds to the end of its second
            }
        request = self._update(record, values, parameters, condition=condition, fields=HELD)
        request["ReturnValues"] = "ALL_NEW"
        return request

    def release(self, record: DataRecord) -> Request:
        """Return the DeleteItem that gives our claim back."""
        return {
            **self.forget(record.idempotency_key),
            "ConditionExpression": OURS,
            "ExpressionAttributeNames": self._names(OURS),
            "ExpressionAttributeValues": {":owner": {"S": record.owner}, ":inprogress": _INPROGRESS},
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        }

    def forget(self, key: str) -> Request:
        """Return the DeleteItem that drops any record of the key."""
        return {"TableName": self.table_name, "Key": self.attributes.primary_key(key)}

    def get(self, key: str) -> Request:
        """Return the GetItem that sees every write before it."""
        return {"TableName": self.table_name, "Key": self.attributes.primary_key(key), "ConsistentRead": True}

    def page(self, prefix: str, *, limit: int) -> tuple[str, Request]:
        """Return the operation that reads the first page of records, and its request: a Query, where that can do."""
        names = self.attributes
        request: Request = {"TableName": self.table_name, "ConsistentRead": True, "Limit": limit}
        values = dict[str, dict[str, str]]()
        expression = ""
        if names.sort_key is not None:
            expression = "#key = :key"
            values[":key"] = {"S": names.static_pk_value}
        if prefix:
            named = "#key" if names.sort_key is None else "#sort_key"
            expression += f"{' AND ' * bool(expression)}begins_with({named}, :prefix)"
            values[":prefix"] = {"S": prefix}
        if expression:
            kind = "FilterExpression" if names.sort_key is None else "KeyConditionExpression"
            request |= {
                kind: expression,
                "ExpressionAttributeNames": self._names(expression),
                "ExpressionAttributeValues": values,
            }
        return ("scan" if names.sort_key is None else "query"), request

    def _update(
        self,
        record: DataRecord,
        values: dict[str, dict[str, str]],
        parameters: dict[str, Any],
        *,
        condition: str,
        fields: frozenset[str],
        first: str = "",
    ) -> Request:
        """Return an UpdateItem that sets those of the fields that have a value, and removes the others."""
        update = _update_expression(frozenset(values), fields, first)
        return {
            "TableName": self.table_name,
            "Key": self.attributes.primary_key(record.idempotency_key),
            "UpdateExpression": update,
            "ConditionExpression": condition,
            "ExpressionAttributeNames": self._names(f"{update} {condition}"),
            "ExpressionAttributeValues": parameters | {f":{name}": value for name, value in values.items()},
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        }

    def _names(self, expression: str) -> dict[str, str]:
        """Return the names of the placeholders that stand in an expression: DynamoDB refuses one too many."""
        return {f"#{name}": getattr(self.attributes, name) for name in _placeholders(expression)}


@cache
def _placeholders(expression: str) -> tuple[str, ...]:
    return tuple(sorted({*re.findall(r"#(\w+)", expression)}))


@cache
def _update_expression(set_fields: frozenset[str], fields: frozenset[str], first: str) -> str:
    settings = _joined([first] * bool(first) + [f"#{name} = :{name}" for name in sorted(set_fields)])
    removals = _joined(f"#{name}" for name in sorted(fields - set_fields))
    return " ".join(f"{word} {clause}" for word, clause in (("SET", settings), ("REMOVE", removals)) if clause)


def _joined(parts: Iterable[str]) -> str:
    return ", ".join(parts)
