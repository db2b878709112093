"""A store of one's own, here a dict, behind the base class of Powertools: before the move."""

from __future__ import annotations

import time
from typing import Any

from aws_lambda_powertools.utilities.idempotency import BasePersistenceLayer
from aws_lambda_powertools.utilities.idempotency.exceptions import (
    IdempotencyItemAlreadyExistsError,
    IdempotencyItemNotFoundError,
)
from aws_lambda_powertools.utilities.idempotency.persistence.datarecord import DataRecord


class OwnPersistenceLayer(BasePersistenceLayer):
    def __init__(self, items: dict[str, dict[str, Any]]) -> None:
        self.items = items
        super().__init__()

    def _get_record(self, idempotency_key: str) -> DataRecord:
        if idempotency_key not in self.items:
            raise IdempotencyItemNotFoundError
        return record_of(idempotency_key, self.items[idempotency_key])

    def _put_record(self, data_record: DataRecord) -> None:
        found = self.items.get(data_record.idempotency_key)
        if found is not None and is_live(found):
            raise IdempotencyItemAlreadyExistsError
        self.items[data_record.idempotency_key] = item_of(data_record)

    def _update_record(self, data_record: DataRecord) -> None:
        self.items[data_record.idempotency_key] = item_of(data_record)

    def _delete_record(self, data_record: DataRecord) -> None:
        self.items.pop(data_record.idempotency_key, None)


def is_live(item: dict[str, Any]) -> bool:
    now = time.time()
    if item["expiration"] < int(now):
        return False
    lease = item.get("in_progress_expiration")
    return item["status"] != "INPROGRESS" or lease is None or lease >= int(now * 1000)


def item_of(record: DataRecord) -> dict[str, Any]:
    item = {
        "status": record.status,
        "expiration": record.expiry_timestamp,
        "in_progress_expiration": record.in_progress_expiry_timestamp,
        "data": record.response_data,
        "validation": record.payload_hash,
    }
    return {name: value for name, value in item.items() if value not in {None, ""}}


def record_of(key: str, item: dict[str, Any]) -> DataRecord:
    return DataRecord(
        key,
        status=item["status"],
        expiry_timestamp=item["expiration"],
        in_progress_expiry_timestamp=item.get("in_progress_expiration"),
        response_data=item.get("data", ""),
        payload_hash=item.get("validation", ""),
    )
