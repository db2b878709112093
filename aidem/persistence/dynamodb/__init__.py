"""Records in a DynamoDB table, which may be shared with AWS Powertools for Python."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, Final, Self, TypeAlias

from aidem._distribution import how_to_install
from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed, Completion
from aidem._rules.record import DataRecord
from aidem._runtime.clock import wall_clock
from aidem._runtime.fork import ForkSafeLock
from aidem.exceptions import (
    IdempotencyInvalidStatusError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
)
from aidem.persistence._context import OpenedByAsyncWith
from aidem.persistence._scan import RECORDS_PER_PAGE, selected

try:
    from aidem.persistence.dynamodb import _table
    from aidem.persistence.dynamodb._client import GivenClient, OwnClients, connect_with
    from aidem.persistence.dynamodb._errors import (
        CONDITION_FAILED,
        THROTTLED,
        code_of,
        response_of,
        too_large,
        translation,
    )
except ModuleNotFoundError as missing:
    message = f"the DynamoDB layer needs aioboto3 or aiobotocore: {how_to_install('dynamodb')}"
    raise ImportError(message) from missing
from aidem.persistence.dynamodb._items import Attributes
from aidem.persistence.dynamodb._requests import Requests

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from aidem._rules.record import RecordStatus
    from aidem.persistence import Diagnosis
    from aidem.persistence.dynamodb._client import Action
    from aidem.persistence.dynamodb._items import Item
    from aidem.persistence.dynamodb._requests import Request

__all__ = ["DynamoDBPersistenceLayer"]

MAX_ITEM_BYTES: Final = 400 * 1024
"""https://docs.aws.amazon.com/amazondynamodb/latest/developerguide/Constraints.html"""


PAUSES_SECONDS: Final = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0)
"""Before a page that was throttled is asked for again."""

Response: TypeAlias = "dict[str, Any]"


@dataclass(frozen=True, slots=True)
class _Refused:
    """The condition of a write did not hold.

    Attributes:
        item: What is there instead; None: nothing.
        was_retried: Whether the client had sent the request before, so that it may have been applied already.
    """

    item: Item | None
    was_retried: bool


class DynamoDBPersistenceLayer(OpenedByAsyncWith):
    """Keeps each record as an item of a table; region, endpoint and credentials come from the AWS environment.

    Conditions of DynamoDB cannot read a clock, so leases are judged by the callers' clocks: set
    `max_clock_skew_seconds` in the config if these can differ.

    Args:
        table_name: The name or the ARN of the table.
        key_attr: The partition key. Default: `"id"`.
        static_pk_value: With a sort key, the partition value of all records. Default:
            `idempotency#{AWS_LAMBDA_FUNCTION_NAME}`.
        sort_key_attr: The sort key, which then holds the idempotency key. Default: None, the table has none.
        expiry_attr: Epoch seconds; the table's TTL attribute. Default: `"expiration"`.
        in_progress_expiry_attr: Epoch milliseconds. Default: `"in_progress_expiration"`.
        status_attr: `INPROGRESS` or `COMPLETED`. Default: `"status"`.
        data_attr: The result as JSON text. Default: `"data"`.
        validation_key_attr: The hash of the validated part of the payload. Default: `"validation"`.
        owner_attr: The random token of the claim. Default: `"owner"`.
        fence_attr: A number that grows with every claim of the key. Default: `"fence"`.
        lease_expiry_attr: Epoch milliseconds, for claims that must not be taken over. Default: `"lease_expiration"`.
        outcome_attr: The kind of an outcome that is not a result. Default: `"outcome"`.
        note_attr: Text for operators, in plain text. Default: `"note"`.
        region_name: The AWS region. Default: None, that of the environment.
        endpoint_url: The address of the service. Default: None, that of the environment or the region.
        boto_config: A `botocore.config.Config` or `AioConfig`, merged into the layer's own. Default: None.
        session: An `aioboto3.Session` that makes the client. Default: None, aiobotocore makes it.
        client: An open DynamoDB client of aioboto3 or aiobotocore. It is used unchanged and never closed, and the layer
            belongs to its event loop. Default: None, the layer makes one for each event loop.
        clock: Returns epoch seconds. Default: the clock of the machine.

    Raises:
        IdempotencyPersistenceConfigError: The table has no name, two attributes have the same name, or the client is
            not asynchronous, is not open, or is passed together with what makes one.
    """

    # Slots: what is set on a layer by mistake, such as `layer.client = ...`, is refused.
    __slots__ = ("__weakref__", "_attributes", "_clients", "_guard", "_last_fence", "_requests", "clock")

    def __init__(
        self,
        table_name: str,
        *,
        key_attr: str = "id",
        static_pk_value: str | None = None,
        sort_key_attr: str | None = None,
        expiry_attr: str = "expiration",
        in_progress_expiry_attr: str = "in_progress_expiration",
        status_attr: str = "status",
        data_attr: str = "data",
        validation_key_attr: str = "validation",
        owner_attr: str = "owner",
        fence_attr: str = "fence",
        lease_expiry_attr: str = "lease_expiration",
        outcome_attr: str = "outcome",
        note_attr: str = "note",
        region_name: str | None = None,
        endpoint_url: str | None = None,
        boto_config: Any | None = None,
        session: Any | None = None,
        client: Any | None = None,
        clock: Callable[[], float] = wall_clock,
    ) -> None:
        if not table_name:
            raise IdempotencyPersistenceConfigError(
                f"table_name={table_name!r} is not the name of a DynamoDB table; pass its name or its ARN"
            )
        settings = (session, boto_config, region_name, endpoint_url)
        if client is not None and any(setting is not None for setting in settings):
            raise IdempotencyPersistenceConfigError(
                "a client is used unchanged: do not pass session, boto_config, region_name or endpoint_url together "
                "with client"
            )
        self.clock = clock
        places = {"region_name": region_name, "endpoint_url": endpoint_url}
        place = {name: value for name, value in places.items() if value is not None}
        self._clients = OwnClients(connect_with(session, boto_config, place)) if client is None else GivenClient(client)
        self._attributes = Attributes(
            key=key_attr,
            sort_key=sort_key_attr,
            static_pk_value=static_pk_value or f"idempotency#{os.environ.get('AWS_LAMBDA_FUNCTION_NAME', '')}",
            expiry=expiry_attr,
            in_progress_expiry=in_progress_expiry_attr,
            lease_expiry=lease_expiry_attr,
            status=status_attr,
            data=data_attr,
            validation=validation_key_attr,
            owner=owner_attr,
            fence=fence_attr,
            outcome=outcome_attr,
            note=note_attr,
        )
        self._requests = Requests(table_name, self._attributes)
        # No item remembers the fence of a claim that was released; the next one may come within the same millisecond.
        self._last_fence = 0
        self._guard = ForkSafeLock()

    async def acquire(
        self, record: DataRecord, *, now: float, max_clock_skew_seconds: float = 0.0
    ) -> Claimed | Blocked:
        """Store a claim unless a live record of another owner is there."""
        request = self._requests.claim(
            record, now=now, max_clock_skew_seconds=max_clock_skew_seconds, last_fence=self._last_fence
        )
        answer = await self._write("update_item", request)
        if not isinstance(answer, _Refused):
            return Claimed(self._claimed(record.idempotency_key, answer))
        if answer.item is None:
            raise IdempotencyPersistenceConfigError(
                "this DynamoDB endpoint does not answer the item that a condition refused "
                "(ReturnValuesOnConditionCheckFailure); use a current one"
            )
        found = self._record(record.idempotency_key, answer.item)
        return Claimed(found) if lifecycle.is_held_by(found, record.owner) else Blocked(found)

    async def take_over(
        self,
        found: DataRecord,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,
        force: bool = False,
    ) -> DataRecord | None:
        """Store a claim in the place of the one found."""
        request = self._requests.take_over(
            found, record, now=now, max_clock_skew_seconds=max_clock_skew_seconds, force=force
        )
        answer = await self._write("update_item", request)
        if not isinstance(answer, _Refused):
            return self._claimed(record.idempotency_key, answer)
        if answer.item is None:
            return None
        stored = self._record(record.idempotency_key, answer.item)
        return stored if lifecycle.taken_over(stored, found, record, now=now) is stored else None  # it was ours

    async def complete(self, record: DataRecord, *, now: float) -> bool:
        """Store an outcome over the claim of the same owner, or where no record is."""
        if len(record.response_data or "") > MAX_ITEM_BYTES:
            raise too_large()
        answer = await self._write("update_item", self._requests.complete(record, now=now))
        if not isinstance(answer, _Refused):
            return True
        found = None if answer.item is None else self._record(record.idempotency_key, answer.item)
        return lifecycle.complete(found, record, now=now) is Completion.ALREADY_STORED

    def completion_item(self, record: DataRecord, *, now: float) -> Request:  # noqa: ARG002 - an owner needs no clock
        """Return the `Update` that stores an outcome over our claim, for a `transact_write_items` of the caller's.

        Raises:
            IdempotencySerializationError: The outcome does not fit into an item.
        """
        if len(record.response_data or "") > MAX_ITEM_BYTES:
            raise too_large()
        return self._requests.complete_ours(record)

    async def renew(self, record: DataRecord, *, now: float) -> DataRecord | None:  # noqa: ARG002 - an owner needs no clock
        """Set the instants of our claim."""
        if record.owner is None:
            return None
        answer = await self._write("update_item", self._requests.renew(record))
        if not isinstance(answer, _Refused):
            return self._record(record.idempotency_key, answer["Attributes"])
        found = None if answer.item is None else self._record(record.idempotency_key, answer.item)
        return (
            found if lifecycle.renewed(found, record) == found else None
        )  # ours, and renewed for longer by a later one

    async def release(self, record: DataRecord) -> bool:
        """Delete our claim."""
        if record.owner is None:
            return False
        answer = await self._write("delete_item", self._requests.release(record))
        # Nothing there, and the client has asked before: that was the delete, and its reply was lost.
        return not isinstance(answer, _Refused) or (answer.was_retried and answer.item is None)

    async def get(self, key: str) -> DataRecord | None:
        """Return the record of a key as it is stored now."""
        answer = await self._send("get_item", self._requests.get(key))
        return self._record(key, answer["Item"]) if "Item" in answer else None

    async def forget(self, key: str) -> None:
        """Drop any record of the key."""
        await self._send("delete_item", self._requests.forget(key))

    def scan(
        self, *, prefix: str = "", status: RecordStatus | None = None, limit: int | None = None
    ) -> AsyncGenerator[DataRecord]:
        """Iterate over the records: by Query under a sort key, else by a Scan, which reads the whole table.

        A page that DynamoDB throttles is asked for again, with growing pauses.
        """
        return selected(self._pages(prefix), status=status, limit=limit)

    async def clock_ahead_seconds(self) -> float:
        """Return how far the layer's clock may be ahead of the service's, which tells its time in whole seconds.

        Operators add it to leases, as a clock that is ahead takes them for passed too early.
        """
        return max(0.0, await self._clock_difference_seconds())

    async def _clock_difference_seconds(self) -> float:
        answer = await self._send("get_item", self._requests.get("aidem:clock"))
        date = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return self.clock() - date.timestamp()

    async def diagnose(self) -> Diagnosis:
        """Look at the table, its TTL and its replicas, as far as the role may; compare clocks.

        Raises:
            IdempotencyPersistenceLayerError: The table cannot be reached or used.
        """
        ahead_seconds = await self._clock_difference_seconds()
        diagnosis: Diagnosis = await self._ask(
            lambda client: _table.diagnosis(client, self._requests, ahead_seconds=ahead_seconds)
        )
        return diagnosis

    async def open(self) -> None:
        """Connect, and look at the table's keys if the role may describe it.

        Raises:
            IdempotencyPersistenceConfigError: The table is missing, or has other keys.
        """
        await self._ask(lambda client: _table.check(client, self._requests))

    async def create_table(self) -> None:
        """Create the table with its TTL, for development; one that exists is checked, and waited for while it is made.

        Raises:
            IdempotencyPersistenceConfigError: It exists with other keys, or may not be created.
        """
        await self._ask(lambda client: _table.create(client, self._requests))

    async def aclose(self) -> None:
        """Close the client of this event loop, unless it was passed in."""
        await self._clients.aclose()

    async def __aenter__(self) -> Self:
        """Open the layer; a table that is missing is logged, so that `create_table` may be called inside."""
        await self._ask(lambda client: _table.check(client, self._requests, may_be_missing=True))
        return self

    async def _pages(self, prefix: str) -> AsyncGenerator[list[DataRecord]]:
        operation, request = self._requests.page(prefix, limit=RECORDS_PER_PAGE)
        while True:
            answer = await self._throttled(operation, request)
            page = list[DataRecord]()
            for item in answer["Items"]:
                with contextlib.suppress(IdempotencyInvalidStatusError):  # no record, under a simple key
                    page.append(self._record(self._attributes.key_of(item), item))
            yield page
            if "LastEvaluatedKey" not in answer:
                return
            request["ExclusiveStartKey"] = answer["LastEvaluatedKey"]

    async def _throttled(self, operation: str, request: Request) -> Response:
        """Send a request that may well be throttled: nobody waits for it, and others need the capacity."""
        for pause_seconds in PAUSES_SECONDS:
            try:
                return await self._send(operation, request)
            except IdempotencyPersistenceConnectionError as error:
                if error.__cause__ is None or code_of(error.__cause__) not in THROTTLED:
                    raise
            await asyncio.sleep(random.uniform(pause_seconds / 2, pause_seconds))  # noqa: S311 - not a secret
        return await self._send(operation, request)

    def _claimed(self, key: str, answer: Response) -> DataRecord:
        claimed = self._record(key, answer["Attributes"])
        with self._guard.lock:
            self._last_fence = max(self._last_fence, claimed.fence)
        return claimed

    def _record(self, key: str, item: Item) -> DataRecord:
        return self._attributes.record_of(key, item)

    async def _write(self, operation: str, request: Request) -> Response | _Refused:
        try:
            return await self._send(operation, request)
        except Exception as error:
            if code_of(error) != CONDITION_FAILED:
                raise
            response = response_of(error)
            was_retried = response["ResponseMetadata"].get("RetryAttempts", 0) > 0
            return _Refused(response.get("Item"), was_retried)

    async def _send(self, operation: str, request: Request) -> Response:
        response: Response = await self._ask(lambda client: getattr(client, operation)(**request))
        return response

    async def _ask(self, action: Action) -> Any:
        with translation(self._requests.table_name):
            return await self._clients.ask(action)
