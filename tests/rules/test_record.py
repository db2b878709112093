"""The record and the errors: values that can be compared, copied, sent to another process and logged."""

from __future__ import annotations

import copy
import datetime
import inspect
import json
import pickle
import re
import time
from typing import Any

import pytest
from aws_lambda_powertools.utilities.idempotency import base as powertools_base
from aws_lambda_powertools.utilities.idempotency.persistence import base as powertools_persistence

from aidem import DataRecord, RecordStatus, exceptions
from aidem._rules.record import OutcomeKind
from aidem.exceptions import (
    IdempotencyAlreadyInProgressError,
    IdempotencyError,
    IdempotencyPersistenceLayerError,
    IdempotencyValidationError,
)

RECORD = DataRecord(
    idempotency_key="pay#1",
    status=RecordStatus.COMPLETED,
    expiry_timestamp=1_700_000_000,
    response_data='{"secret": 1}',
    owner="token",
    fence=3,
)


def test_a_record_is_immutable() -> None:
    with pytest.raises(AttributeError, match=r"record.replace\(fence=...\)"):
        RECORD.fence = 4  # type: ignore[misc] # which is what is tested
    with pytest.raises(AttributeError, match="cannot delete"):
        del RECORD.fence


def test_records_are_compared_by_value() -> None:
    same = RECORD.replace()
    assert same == RECORD
    assert hash(same) == hash(RECORD)
    assert RECORD.replace(fence=4) != RECORD
    something_else: object = "pay#1"
    assert something_else != RECORD


def test_a_record_survives_copies_and_pickles() -> None:
    assert copy.deepcopy(RECORD) == pickle.loads(pickle.dumps(RECORD)) == RECORD


def test_a_record_never_prints_its_result() -> None:
    assert "secret" not in repr(RECORD)
    assert "fence=3" in repr(RECORD)


def test_expiry_as_powertools_has_it() -> None:
    assert RECORD.is_expired
    assert not RECORD.replace(expiry_timestamp=int(time.time()) + 60).is_expired
    assert not RECORD.replace(expiry_timestamp=None).is_expired
    assert RECORD.get_expiration_datetime() == datetime.datetime.fromtimestamp(1_700_000_000, tz=datetime.UTC)
    assert RECORD.replace(expiry_timestamp=None).get_expiration_datetime() is None


def test_the_result_as_powertools_has_it() -> None:
    assert RECORD.response_json_as_dict() == {"secret": 1}
    assert RECORD.replace(response_data=None).response_json_as_dict() is None
    assert RECORD.replace(outcome=OutcomeKind.UNAVAILABLE).response_json_as_dict() is None


def test_an_error_keeps_its_facts_in_copies_and_pickles() -> None:
    error = IdempotencyAlreadyInProgressError(key="pay#1", record=RECORD, retry_after_seconds=1.0)
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert type(twin) is IdempotencyAlreadyInProgressError
        assert (twin.key, twin.record, twin.retry_after_seconds) == ("pay#1", RECORD, 1.0)
        assert str(twin) == str(error)
        assert isinstance(twin, IdempotencyError)


ERRORS = [cls for cls in vars(exceptions).values() if isinstance(cls, type) and issubclass(cls, Exception)]


assert len(ERRORS) > 10


@pytest.mark.parametrize("cls", ERRORS)
def test_an_error_can_be_made_again_from_its_args_a_copy_or_a_pickle(cls: type[Exception]) -> None:
    facts: dict[str, Any] = {}
    if issubclass(cls, IdempotencyError):
        facts = {"key": "pay#1", "record": RECORD, "retry_after_seconds": 1.0, "reason": "it is {gone}"}
    for error in (cls("it is {gone}"), cls(**facts), cls()):
        from_args = cls(*json.loads(json.dumps(error.args)))  # as a task queue sends them
        for twin in (from_args, copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
            assert type(twin) is cls
            assert str(twin) == str(error)
            assert twin.args == error.args


@pytest.mark.parametrize(
    ("cls", "beginning"),
    [
        (IdempotencyAlreadyInProgressError, "Execution already in progress with idempotency key: "),
        (IdempotencyValidationError, "Payload does not match stored record for this event key"),
    ],
)
def test_a_refusal_begins_with_the_words_of_powertools_and_says_what_to_do(
    cls: type[IdempotencyError], beginning: str
) -> None:
    assert beginning in inspect.getsource(powertools_base) + inspect.getsource(powertools_persistence)
    text = str(cls(record=RECORD))
    assert text.startswith(beginning)
    assert "'pay#1'" in text
    assert re.search(r"; (retry later|repeat the original payload), or ", text)


class TableGoneError(IdempotencyPersistenceLayerError):
    def __init__(self, *, table: str) -> None:
        super().__init__(f"the table {table} is gone")
        self.table = table


def test_an_error_of_somebody_elses_keeps_what_it_was_made_of_in_copies_and_pickles() -> None:
    error = TableGoneError(table="payments")
    for twin in (copy.copy(error), pickle.loads(pickle.dumps(error))):
        assert isinstance(twin, TableGoneError)
        assert (twin.table, str(twin)) == ("payments", str(error))
