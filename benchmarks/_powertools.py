"""AWS Powertools on a dict: its own rules, and the least that a layer can cost."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from aws_lambda_powertools.utilities.idempotency.exceptions import (
    IdempotencyItemAlreadyExistsError,
    IdempotencyItemNotFoundError,
)
from aws_lambda_powertools.utilities.idempotency.persistence.base import BasePersistenceLayer

if TYPE_CHECKING:
    from aws_lambda_powertools.utilities.idempotency.persistence.datarecord import DataRecord


class DictPersistenceLayer(BasePersistenceLayer):
    """Keeps records in a dict, with the condition of Powertools' own layers."""

    def __init__(self) -> None:
        self.records: dict[str, DataRecord] = {}
        super().__init__()

    def _put_record(self, data_record: DataRecord) -> None:
        found = self.records.get(data_record.idempotency_key)
        if found is not None and not found.is_expired and not _is_lapsed(found):
            raise IdempotencyItemAlreadyExistsError(old_data_record=found)
        self.records[data_record.idempotency_key] = data_record

    def _get_record(self, idempotency_key: str) -> DataRecord:
        try:
            return self.records[idempotency_key]
        except KeyError:
            raise IdempotencyItemNotFoundError from None

    def _update_record(self, data_record: DataRecord) -> None:
        self.records[data_record.idempotency_key] = data_record

    def _delete_record(self, data_record: DataRecord) -> None:
        self.records.pop(data_record.idempotency_key, None)


def _is_lapsed(record: DataRecord) -> bool:
    if record.status != "INPROGRESS" or record.in_progress_expiry_timestamp is None:
        return False
    return record.in_progress_expiry_timestamp < datetime.datetime.now(tz=datetime.UTC).timestamp() * 1000
