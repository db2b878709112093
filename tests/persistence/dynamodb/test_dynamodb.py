from __future__ import annotations

import time
from typing import Any
from urllib.parse import urlencode

import pytest
from botocore.exceptions import ClientError

from aidem import IdempotencyConfig, current_execution, idempotent_function
from aidem._rules.lifecycle import Blocked, Claimed
from aidem._rules.record import DataRecord, OutcomeKind, RecordStatus
from aidem.exceptions import (
    IdempotencyInvalidStatusError,
    IdempotencyPersistenceConfigError,
    IdempotencyResultUnavailableError,
    IdempotencySerializationError,
)
from aidem.persistence import PersistenceLayer, SupportsCompletionItem, open_persistence_layer
from aidem.persistence._stored import NOT_A_TEXT
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.testing import (
    CompletionItemConformance,
    FakeClock,
    ScanConformance,
    TakeOverConformance,
    claim_of,
    completed_of,
)
from tests.support.aws_servers import EMULATORS, Database

pytestmark = [pytest.mark.server, pytest.mark.timeout(60, func_only=True)]

# Every one of them is a word that DynamoDB reserves, or would have to escape.
OTHER_NAMES: dict[str, Any] = {
    "key_attr": "partition",
    "sort_key_attr": "key",
    "static_pk_value": "everything",
    "expiry_attr": "ttl",
    "in_progress_expiry_attr": "in-progress.expiry",
    "status_attr": "state",
    "data_attr": "values",
    "validation_key_attr": "hash",
    "owner_attr": "user",
    "fence_attr": "count",
    "lease_expiry_attr": "timestamp",
    "outcome_attr": "#result",
    "note_attr": "comment",
}
NOW = 1_800_000_000.0


class SentItems(CompletionItemConformance):
    """Sends items by AWS's own client."""

    database: Database

    async def send(self, layer: PersistenceLayer, item: dict[str, Any]) -> bool:
        return sent(self.database, {"Update": item})


def sent(database: Database, *items: dict[str, Any]) -> bool:
    """Write several items in one request, or none of them."""
    try:
        database.client.transact_write_items(TransactItems=items)
    except database.client.exceptions.TransactionCanceledException:
        return False
    return True


class TestConformance(SentItems, TakeOverConformance, ScanConformance):
    adds_clock_skew = True

    @pytest.fixture(autouse=True)
    def with_table(self, database: Database, table: str) -> None:
        self.database = database
        self.table = table

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return DynamoDBPersistenceLayer(self.table, clock=clock)


@pytest.mark.parametrize("database", EMULATORS[-1:], indirect=True)
class TestConformanceUnderACompositeKeyAndOtherNames(SentItems, TakeOverConformance, ScanConformance):
    adds_clock_skew = True

    @pytest.fixture(autouse=True)
    def with_table(self, database: Database) -> None:
        self.database = database
        self.table = database.create_table("partition", "key")

    async def make_layer(self, clock: FakeClock) -> PersistenceLayer:
        return DynamoDBPersistenceLayer(self.table, clock=clock, **OTHER_NAMES)


@pytest.fixture
def layer(table: str) -> DynamoDBPersistenceLayer:
    return DynamoDBPersistenceLayer(table)


async def claimed(layer: DynamoDBPersistenceLayer, **options: Any) -> DataRecord:
    now = options.setdefault("now", NOW)
    answer = await layer.acquire(claim_of("key", **options), now=now)
    assert isinstance(answer, Claimed)
    return answer.record


# --- The item ---------------------------------------------------------------------------------------------------------


async def test_a_claim_is_the_item_of_the_wire_format(
    layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    record = await claimed(layer, payload_hash="hash", note="order 7")
    assert database.item(table) == {
        "id": {"S": "key"},
        "expiration": {"N": "1800000004"},
        "in_progress_expiration": {"N": "1800000002000"},
        "status": {"S": "INPROGRESS"},
        "validation": {"S": "hash"},
        "owner": {"S": "ours"},
        "fence": {"N": "1800000000001"},
        "note": {"S": "order 7"},
    }
    assert record.fence == 1_800_000_000_001


async def test_an_outcome_is_the_item_of_the_wire_format(
    layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    record = await claimed(layer, may_be_taken_over=False)
    assert database.item(table)["lease_expiration"] == {"N": "1800000002000"}
    assert "in_progress_expiration" not in database.item(table)
    await layer.complete(completed_of(record, now=NOW, response_data="null"), now=NOW)
    item = {
        "id": {"S": "key"},
        "expiration": {"N": "1800000004"},
        "status": {"S": "COMPLETED"},
        "data": {"S": "null"},
        "owner": {"S": "ours"},
        "fence": {"N": "1800000000001"},
    }
    assert database.item(table) == item
    await layer.forget("key")
    unavailable = completed_of(record, now=NOW, response_data="aidem:unavailable", outcome=OutcomeKind.UNAVAILABLE)
    await layer.complete(unavailable, now=NOW)
    assert database.item(table) == item | {"data": {"S": "aidem:unavailable"}, "outcome": {"S": "unavailable"}}


async def test_a_composite_key_holds_the_idempotency_key_in_its_sort_key(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = database.create_table("pk", "sk")
    monkeypatch.setenv("AWS_LAMBDA_FUNCTION_NAME", "pay")
    record = await claimed(DynamoDBPersistenceLayer(table, key_attr="pk", sort_key_attr="sk"))
    (item,) = database.items(table)
    assert (item["pk"], item["sk"]) == ({"S": "idempotency#pay"}, {"S": "key"})
    assert (record.idempotency_key, record.sort_key) == ("key", "key")


async def test_every_attribute_has_the_name_that_was_given(database: Database) -> None:
    table = database.create_table("partition", "key")
    layer = DynamoDBPersistenceLayer(table, **OTHER_NAMES)
    record = await claimed(layer, payload_hash="hash", may_be_taken_over=False, note="order 7")
    names = {*database.items(table)[0]}
    await layer.forget("key")
    await claimed(layer)
    names |= {*database.items(table)[0]}
    await layer.complete(record.replace(status=RecordStatus.COMPLETED, response_data="1", outcome="exception"), now=NOW)
    names |= {*database.items(table)[0]}
    assert names == {name for option, name in OTHER_NAMES.items() if option.endswith("_attr")}


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"sort_key_attr": "id"}, "['id'] is used more than once"),
        ({"data_attr": "x", "owner_attr": "x"}, "['x'] is used more than once"),
        ({"data_attr": ""}, "one of them is empty"),
    ],
)
def test_attributes_need_names_of_their_own(names: dict[str, Any], message: str) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError) as refused:
        DynamoDBPersistenceLayer("table", **names)
    assert message in str(refused.value)


@pytest.mark.parametrize("table_name", [None, ""])
def test_a_table_needs_a_name(table_name: Any) -> None:
    with pytest.raises(IdempotencyPersistenceConfigError, match=f"table_name={table_name!r} is not the name of a"):
        DynamoDBPersistenceLayer(table_name)


# --- What others wrote ------------------------------------------------------------------------------------------------


async def test_numbers_may_be_fractions_or_text(
    layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    database.put(
        table,
        id={"S": "key"},
        status={"S": "INPROGRESS"},
        expiration={"N": "1800000004.75"},
        in_progress_expiration={"S": "1800000002000"},
        lease_expiration={"S": "1.8E12"},
        fence={"N": "7.0"},
        validation={"NULL": True},
    )
    found = await layer.get("key")
    assert found == DataRecord(
        idempotency_key="key",
        status=RecordStatus.INPROGRESS,
        expiry_timestamp=1_800_000_004,
        in_progress_expiry_timestamp=1_800_000_002_000,
        lease_expiry_timestamp=1_800_000_000_000,
        fence=7,
    )


async def test_a_record_of_few_attributes_is_a_record(
    layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    database.put(table, id={"S": "key"}, status={"S": "COMPLETED"})
    found = DataRecord(idempotency_key="key", status=RecordStatus.COMPLETED)
    assert await layer.get("key") == found
    assert await layer.acquire(claim_of("key", now=NOW), now=NOW) == Blocked(found)


async def test_a_claim_without_a_lease_holds_until_it_expires(
    layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    database.put(table, id={"S": "key"}, status={"S": "INPROGRESS"}, expiration={"N": str(int(NOW))})
    assert isinstance(await layer.acquire(claim_of("key", now=NOW), now=NOW), Blocked)
    assert (await claimed(layer, now=NOW + 1)).fence == int(NOW + 1) * 1000 + 1


async def test_the_next_fence_follows_the_one_found(
    layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    database.put(
        table, id={"S": "key"}, status={"S": "INPROGRESS"}, expiration={"N": "1"}, fence={"N": "9007199254740993"}
    )
    assert (await claimed(layer)).fence == 9_007_199_254_740_994


async def test_a_claim_of_another_library_is_taken_over_to_resolve_it(
    layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    lapsed = {
        "id": {"S": "key"},
        "status": {"S": "INPROGRESS"},
        "expiration": {"N": str(int(NOW) + 100)},
        "in_progress_expiration": {"N": str(int(NOW) * 1000 - 1)},
    }
    database.put(table, **lapsed)
    found = await layer.get("key")
    assert found is not None
    assert (found.owner, found.fence) == (None, 0)
    database.put(table, fence={"N": "7"}, **lapsed)
    assert await layer.take_over(found, claim_of("key", now=NOW), now=NOW) is None
    database.put(table, **lapsed)
    taken = await layer.take_over(found, claim_of("key", now=NOW), now=NOW)
    assert taken is not None
    assert taken == await layer.get("key")
    assert taken.fence == int(NOW) * 1000 + 1


@pytest.mark.parametrize(
    "attributes",
    [
        {},
        {"status": {"S": "SLEEPING"}},
        {"status": {"S": "COMPLETED"}, "outcome": {"S": "unheard of"}},
        {"status": {"S": "COMPLETED"}, "expiration": {"S": "tomorrow"}},
        {"status": {"S": "COMPLETED"}, "expiration": {"M": {}}},
        {"status": {"S": "COMPLETED"}, "outcome": {"N": "1"}},
        {"status": {"N": "1"}},
    ],
)
async def test_an_item_that_is_no_record_is_refused_with_what_to_do(
    attributes: dict[str, Any], layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    database.put(table, id={"S": "key"}, data={"S": "secret"}, **attributes)
    with pytest.raises(IdempotencyInvalidStatusError, match=r"forget\(key\)") as refused:
        await layer.get("key")
    assert refused.value.key == "key"
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("data", [{"N": "1"}, {"B": b"null"}, {"M": {}}, {"L": []}, {"BOOL": True}])
async def test_a_result_of_another_type_is_unavailable_and_no_second_run(
    data: Any, layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    runs = list[str]()

    @idempotent_function(persistence_store=layer)
    async def charge(order_id: str) -> str:
        runs.append(order_id)
        return "charged"

    assert await charge("o-1") == "charged"
    (item,) = database.client.scan(TableName=table)["Items"]
    database.put(table, **(item | {"data": data}))
    with pytest.raises(IdempotencyResultUnavailableError):
        await charge("o-1")
    assert runs == ["o-1"]


async def test_a_hash_or_an_owner_of_another_type_is_nobodys_and_null_is_none(
    layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    odd: dict[str, Any] = {
        "owner": {"N": "1"},
        "validation": {"M": {}},
        "data": {"NULL": True},
        "in_progress_expiration": {"NULL": True},
    }
    database.put(table, id={"S": "key"}, status={"S": "INPROGRESS"}, **odd)
    record = await layer.get("key")
    assert record is not None
    assert (record.owner, record.payload_hash) == (NOT_A_TEXT, NOT_A_TEXT)
    assert (record.response_data, record.in_progress_expiry_timestamp) == (None, None)


# --- Our own, found again ---------------------------------------------------------------------------------------------


async def test_our_own_claim_is_found_again_as_it_was_stored_though_it_has_lapsed(
    layer: DynamoDBPersistenceLayer,
) -> None:
    first = await claimed(layer)
    assert await claimed(layer, now=NOW + 3) == first
    assert (await claimed(layer, now=NOW + 3, owner="theirs")).fence == first.fence + 1


async def test_skew_is_added_to_a_lease_and_not_to_an_expiry(layer: DynamoDBPersistenceLayer) -> None:
    await claimed(layer, owner="theirs")
    early = await layer.acquire(claim_of("key", now=NOW + 3), now=NOW + 3, max_clock_skew_seconds=1.5)
    assert isinstance(early, Blocked)
    assert early.now is None
    late = await layer.acquire(claim_of("key", now=NOW + 5), now=NOW + 5, max_clock_skew_seconds=60)
    assert isinstance(late, Claimed)


# --- With the engine --------------------------------------------------------------------------------------------------


def test_a_layer_is_judged_by_its_callers_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = DynamoDBPersistenceLayer("table")
    assert isinstance(layer, PersistenceLayer)
    monkeypatch.setattr("time.time", lambda: 1893456000.0)  # looked up late
    assert layer.clock() == 1893456000.0


async def test_a_function_runs_once(table: str) -> None:
    calls = list[dict[str, Any]]()

    async with DynamoDBPersistenceLayer(table) as layer:

        @idempotent_function(data_keyword_argument="order", persistence_store=layer)
        async def pay(order: dict[str, Any]) -> dict[str, Any]:
            calls.append(order)
            return {"paid": "Zürich 東京", "amounts": [1, 2.5, None]}

        first = await pay({"id": 1})
        assert first == await pay({"id": 1}) == {"paid": "Zürich 東京", "amounts": [1, 2.5, None]}
    assert len(calls) == 1


@pytest.mark.parametrize("size", [400_000, 409_600, 500_000, 3_000_000])
async def test_a_result_too_large_for_an_item_is_not_a_second_run(
    size: int, layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    calls = 0

    @idempotent_function(persistence_store=layer, config=IdempotencyConfig(hash_function="md5"), key_prefix="large")
    async def report() -> str:
        nonlocal calls
        calls += 1
        return "x" * size

    assert len(await report()) == size
    if size == 400_000:
        assert len(await report()) == size
    else:
        with pytest.raises(IdempotencyResultUnavailableError):
            await report()
        (item,) = database.items(table)
        assert item["outcome"] == {"S": "unavailable"}
    assert calls == 1
    await layer.aclose()


def test_a_url_names_a_table(table: str) -> None:
    layer = open_persistence_layer(f"dynamodb://{table}")
    assert isinstance(layer, DynamoDBPersistenceLayer)


async def test_items_of_others_in_the_table_are_not_listed(
    layer: DynamoDBPersistenceLayer, database: Database, table: str
) -> None:
    record = await claimed(layer)
    database.put(table, id={"S": "order 7"}, total={"N": "42"})
    database.put(table, id={"S": "order 8"}, status={"S": "SHIPPED"})
    assert [found async for found in layer.scan()] == [record]


async def test_only_records_under_the_partition_value_are_listed(database: Database) -> None:
    table = database.create_table("pk", "sk")
    ours, theirs = (
        DynamoDBPersistenceLayer(table, key_attr="pk", sort_key_attr="sk", static_pk_value=value)
        for value in ("ours", "theirs")
    )
    record = await claimed(ours)
    await claimed(theirs)
    assert [found async for found in ours.scan()] == [record]


# --- An outcome among the caller's own writes -------------------------------------------------------------------------


@pytest.mark.parametrize("is_lost", [False, True])
async def test_an_outcome_and_the_callers_items_are_written_together_or_not_at_all(
    layer: DynamoDBPersistenceLayer, database: Database, table: str, is_lost: bool
) -> None:
    payments = database.create_table()
    record = await claimed(layer)
    if is_lost:
        await layer.forget("key")
    assert isinstance(layer, SupportsCompletionItem)
    completion = layer.completion_item(completed_of(record, now=NOW), now=NOW)
    payment = {"Put": {"TableName": payments, "Item": {"id": {"S": "payment"}}}}
    assert sent(database, payment, {"Update": completion}) != is_lost
    assert len(database.items(payments)) == len(database.items(table)) == (0 if is_lost else 1)


def test_an_outcome_that_is_too_large_for_an_item_is_refused_before_it_is_sent() -> None:
    record = completed_of(claim_of("key", now=NOW), now=NOW, response_data="x" * (400 * 1024 + 1))
    with pytest.raises(IdempotencySerializationError):
        DynamoDBPersistenceLayer("table").completion_item(record, now=NOW)


def test_a_request_that_fails_does_not_show_what_is_stored() -> None:
    item = DynamoDBPersistenceLayer("table").completion_item(completed_of(claim_of("key", now=NOW), now=NOW), now=NOW)
    assert set(item) == {
        "TableName",
        "Key",
        "UpdateExpression",
        "ConditionExpression",
        "ExpressionAttributeNames",
        "ExpressionAttributeValues",
    }


async def test_a_url_says_where_the_table_is_and_what_its_attributes_are_called(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = database.create_table("partition", "key")
    endpoint = database.client.meta.endpoint_url
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_DYNAMODB", "AWS_DEFAULT_REGION", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    names = {"region": database.client.meta.region_name, "endpoint": endpoint, **OTHER_NAMES}
    layer = open_persistence_layer(f"dynamodb://{table}?{urlencode(names)}")
    assert isinstance(layer, DynamoDBPersistenceLayer)
    async with layer:
        await claimed(layer, payload_hash="hash", note="order 7")
    (item,) = database.items(table)
    assert {name: item[OTHER_NAMES[name]] for name in ("key_attr", "note_attr", "validation_key_attr")} == {
        "key_attr": {"S": "everything"},
        "note_attr": {"S": "order 7"},
        "validation_key_attr": {"S": "hash"},
    }


@pytest.mark.parametrize("fails", [False, True])
async def test_a_call_is_completed_among_the_writes_of_its_own_request(
    layer: DynamoDBPersistenceLayer, database: Database, table: str, fails: bool
) -> None:
    payments = database.create_table()
    if fails:
        database.put(payments, id={"S": "o-1"})

    @idempotent_function(persistence_store=layer)
    async def pay(order: str) -> Any:
        update = await current_execution().completion_item({"paid": order})
        assert update is not None
        put = {"TableName": payments, "Item": {"id": {"S": order}}, "ConditionExpression": "attribute_not_exists(id)"}
        database.client.transact_write_items(TransactItems=[{"Put": put}, {"Update": update}])

    if fails:
        with pytest.raises(database.client.exceptions.TransactionCanceledException):
            await pay("o-1")
        assert database.items(table) == []
    else:
        assert [await pay("o-1") for _ in range(2)] == [{"paid": "o-1"}] * 2
    assert len(database.items(payments)) == 1
    await layer.aclose()


@pytest.mark.parametrize(("ahead_seconds", "expected"), [(0, 0), (100, 100), (-100, 0)])
async def test_a_clock_that_is_ahead_of_the_service_is_noticed(
    table: str, ahead_seconds: float, expected: float
) -> None:
    layer = DynamoDBPersistenceLayer(table, clock=lambda: time.time() + ahead_seconds)
    async with layer:
        assert await layer.clock_ahead_seconds() == pytest.approx(expected, abs=5)


async def test_a_diagnosis_tells_what_the_table_is(database: Database) -> None:
    table = database.create_table("pk", "sk")
    options: dict[str, Any] = {"key_attr": "pk", "sort_key_attr": "sk", "expiry_attr": "until"}
    async with DynamoDBPersistenceLayer(table, **options) as layer:
        facts, problems = await layer.diagnose()
        assert facts["table"] == f"{table}, ACTIVE"
        assert facts["keys"] == "HASH 'pk' (S), RANGE 'sk' (S)"
        assert facts["billing"] == "PAY_PER_REQUEST"
        assert facts["clock of this machine"] == "as the store's"
        assert [problem.partition(";")[0] for problem in problems] == [
            "TTL is off: expired records are never removed, and the table grows"
        ]
        for attribute in ("until", "lease"):
            specification = {"Enabled": True, "AttributeName": attribute}
            database.client.update_time_to_live(TableName=table, TimeToLiveSpecification=specification)
            facts, problems = await layer.diagnose()
            assert facts["TTL"] == f"ENABLED on {attribute}"
            if attribute == "until":
                assert problems == ()
                database.client.update_time_to_live(
                    TableName=table, TimeToLiveSpecification=specification | {"Enabled": False}
                )
        [problem] = problems
        assert "TTL is on 'lease', and records expire by 'until': they are removed too early or never" in problem


class Described:
    """A client of a table in a bad state, of which another region has a replica, and whose role may not see its TTL."""

    exceptions: Any = None

    def __init__(self, **description: Any) -> None:
        self._description = {
            "TableStatus": "ARCHIVED",
            "KeySchema": [{"AttributeName": "id", "KeyType": "HASH"}],
            "AttributeDefinitions": [{"AttributeName": "id", "AttributeType": "S"}],
            "Replicas": [{"RegionName": "eu-west-1"}],
        } | description

    async def get_item(self, **_request: Any) -> Any:
        return {"ResponseMetadata": {"HTTPHeaders": {"date": "Thu, 01 Jan 1970 00:00:10 GMT"}}}

    async def describe_table(self, **_request: Any) -> Any:
        return {"Table": self._description}

    async def describe_time_to_live(self, **_request: Any) -> Any:
        raise ClientError({"Error": {"Code": "AccessDeniedException"}}, "DescribeTimeToLive")

    async def describe_continuous_backups(self, **_request: Any) -> Any:
        raise TypeError("a fault of the client")


async def test_a_diagnosis_tells_what_endangers_records_and_what_the_role_may_not_see() -> None:
    client = Described()
    layer = DynamoDBPersistenceLayer("records", client=client, clock=lambda: 100)
    with pytest.raises(TypeError, match="a fault of the client"):
        await layer.diagnose()
    client.describe_continuous_backups = client.describe_time_to_live  # type: ignore[method-assign]
    facts, problems = await layer.diagnose()
    assert facts["TTL"] == facts["point-in-time recovery"] == "not shown to this role"
    assert facts["billing"] == "PROVISIONED"
    assert [problem.partition(":")[0] for problem in problems] == [
        "the clock of this machine is 90 s ahead of the store's",
        "the table is ARCHIVED",
        "the table has replicas in eu-west-1, which agree only after a while",
    ]
    client = Described(TableStatus="ACTIVE", MultiRegionConsistency="STRONG")
    client.describe_continuous_backups = client.describe_time_to_live  # type: ignore[method-assign]
    assert (await DynamoDBPersistenceLayer("records", client=client, clock=lambda: 10).diagnose()).problems == ()
    client.describe_table = client.describe_time_to_live  # type: ignore[method-assign]
    facts, problems = await DynamoDBPersistenceLayer("records", client=client, clock=lambda: 10).diagnose()
    assert {facts["table"], facts["keys"]} == {"records, not shown to this role", "not shown to this role"}
    assert problems == ()
