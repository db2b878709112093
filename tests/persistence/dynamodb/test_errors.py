"""What goes wrong at DynamoDB, or on the way there, and what it is called."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import pytest
from botocore.config import Config
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    NoCredentialsError,
    ReadTimeoutError,
    UnknownEndpointError,
)
from botocore.parsers import ResponseParserError

from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.testing import claim_of, completed_of
from tests.support.aws_servers import Database
from tests.support.servers import free_port

pytestmark = [pytest.mark.server, pytest.mark.timeout(60, func_only=True)]

CONFIG = IdempotencyPersistenceConfigError
CONNECTION = IdempotencyPersistenceConnectionError
ONCE = Config(retries={"total_max_attempts": 1}, connect_timeout=5, read_timeout=5)
CLAIM = claim_of("key", now=0)


@dataclass
class FailingClient:
    """A client whose every operation fails."""

    error: Exception

    def __getattr__(self, operation: str) -> Any:
        async def fail(**_request: Any) -> Any:
            raise self.error

        return fail


def failing(error: Exception) -> DynamoDBPersistenceLayer:
    return DynamoDBPersistenceLayer("payments", client=FailingClient(error))


def answer(code: str, message: str = "secret", status: int = 400) -> ClientError:
    response: Any = {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(response, "UpdateItem")


@pytest.mark.parametrize(
    ("error", "kind", "advice"),
    [
        (answer("ProvisionedThroughputExceededException"), CONNECTION, "raise the table's capacity"),
        (answer("ThrottlingException"), CONNECTION, "retry"),
        (answer("RequestLimitExceeded"), CONNECTION, "retry"),
        (answer("InternalServerError", status=500), CONNECTION, "retry"),
        (answer("ServiceUnavailable", status=503), CONNECTION, "retry"),
        (answer("502", status=502), CONNECTION, "retry"),
        (answer("ReplicatedWriteConflictException"), CONNECTION, "retry"),
        (answer("ResourceNotFoundException"), CONFIG, "'payments' does not exist"),
        (answer("AccessDeniedException"), CONFIG, "dynamodb:UpdateItem, dynamodb:GetItem and dynamodb:DeleteItem"),
        (answer("ExpiredTokenException"), CONFIG, "renew them"),
        (answer("UnrecognizedClientException"), CONFIG, "credentials"),
        (answer("InvalidSignatureException"), CONFIG, "check the machine's clock"),
        (answer("ValidationException", "The provided key element does not match the schema"), CONFIG, "sort_key_attr"),
        (
            answer("ValidationException", "Aggregated size of all range keys has exceeded the size limit"),
            CONFIG,
            "shorter key_prefix",
        ),
        (
            answer("ValidationException", "Item size to update has exceeded the maximum allowed size"),
            IdempotencySerializationError,
            "400 KB",
        ),
        (answer("413", status=413), IdempotencySerializationError, "400 KB"),
        (answer("SomethingNewException"), IdempotencyPersistenceLayerError, "SomethingNewException"),
        (ConnectTimeoutError(endpoint_url="secret"), CONNECTION, "check the network"),
        (ReadTimeoutError(endpoint_url="secret"), CONNECTION, "ReadTimeoutError"),
        (EndpointConnectionError(endpoint_url="secret"), CONNECTION, "EndpointConnectionError"),
        (HTTPClientError(error="secret"), CONNECTION, "HTTPClientError"),
        (ResponseParserError("secret"), CONNECTION, "did not answer"),
        (OSError("secret"), CONNECTION, "OSError"),
        (NoCredentialsError(), CONFIG, "AWS_PROFILE"),
        (CredentialRetrievalError(provider="secret", error_msg="secret"), CONFIG, "give the process a role"),
        (UnknownEndpointError(service_name="secret", region_name="secret"), CONFIG, "check boto_config"),
    ],
)
async def test_a_failure_is_one_of_aidems_that_says_what_to_do(
    error: Exception, kind: type[Exception], advice: str
) -> None:
    layer = failing(error)
    for operation in (layer.acquire(CLAIM, now=0), layer.complete(completed_of(CLAIM, now=0), now=0)):
        with pytest.raises(kind) as raised:
            await operation
        assert type(raised.value) is kind
        assert advice in str(raised.value)
        assert "secret" not in str(raised.value)
        assert raised.value.__cause__ is error


async def test_an_error_that_is_nobodys_is_left_alone() -> None:
    with pytest.raises(ZeroDivisionError):
        await failing(ZeroDivisionError()).get("key")


@pytest.mark.parametrize("said", [RuntimeError("attached to a different loop"), AttributeError("None has no get")])
async def test_a_client_that_is_closed_or_of_another_loop_is_no_outage(said: Exception) -> None:
    error = HTTPClientError(error=said)  # as aiobotocore wraps what it meets
    with pytest.raises(CONFIG, match="closed, or belongs to another event loop"):
        await failing(error).get("key")


async def test_an_endpoint_that_does_not_tell_what_it_found_is_refused() -> None:
    with pytest.raises(CONFIG, match="use a current one"):
        await failing(answer("ConditionalCheckFailedException")).acquire(CLAIM, now=0)


# --- The table --------------------------------------------------------------------------------------------------------


async def test_a_missing_table_is_found_when_the_layer_is_opened(database: Database) -> None:
    layer = DynamoDBPersistenceLayer("missing-table")
    with pytest.raises(CONFIG, match=r"'missing-table' does not exist.*create_table"):
        await layer.open()
    with pytest.raises(CONFIG, match="does not exist"):
        await layer.acquire(CLAIM, now=0)
    await layer.aclose()


@pytest.mark.parametrize(
    ("keys", "options", "shown"),
    [
        (("pk", None), {}, "has the keys HASH 'pk' (S), the layer expects HASH 'id' (S)"),
        (("id", "sk"), {}, "HASH 'id' (S), RANGE 'sk' (S), the layer expects HASH 'id' (S);"),
        (("id", None), {"sort_key_attr": "sk"}, "the layer expects HASH 'id' (S), RANGE 'sk' (S)"),
    ],
)
async def test_other_keys_are_found_when_the_layer_is_opened_or_used(
    keys: tuple[str, str | None], options: dict[str, Any], shown: str, database: Database
) -> None:
    layer = DynamoDBPersistenceLayer(database.create_table(*keys), **options)
    with pytest.raises(CONFIG) as raised:
        await layer.open()
    assert shown in str(raised.value)
    with pytest.raises(CONFIG) as raised:
        await layer.create_table()
    assert shown in str(raised.value)
    with pytest.raises(CONFIG, match="does not fit the requests"):
        await layer.acquire(CLAIM, now=0)
    await layer.aclose()


@pytest.mark.parametrize("code", ["AccessDeniedException", "ThrottlingException"])
async def test_who_may_not_describe_the_table_goes_on(code: str) -> None:
    await failing(answer(code)).open()


async def test_a_table_is_created_for_development_with_its_ttl(database: Database) -> None:
    layouts: list[dict[str, Any]] = [{}, {"key_attr": "pk", "sort_key_attr": "sk", "expiry_attr": "ttl"}]
    for number, options in enumerate(layouts):
        name = f"{database.create_table()}-{number}"
        layer = DynamoDBPersistenceLayer(name, **options)
        await layer.create_table()
        async with layer:
            await layer.acquire(claim_of("key", now=0), now=0)
            await layer.create_table()
            assert await layer.get("key") is not None
        ttl = database.client.describe_time_to_live(TableName=name)["TimeToLiveDescription"]
        assert ttl["AttributeName"] == options.get("expiry_attr", "expiration")
        assert ttl["TimeToLiveStatus"] in {"ENABLING", "ENABLED"}


async def test_a_table_can_be_created_within_the_open_layer_and_by_several_at_once(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"{database.create_table()}-later"
    async with DynamoDBPersistenceLayer(name) as layer, DynamoDBPersistenceLayer(name) as other:
        assert caplog.text.count(f"DynamoDB table '{name}' does not exist yet") == 2
        with pytest.raises(CONFIG, match="does not exist"):
            await layer.acquire(CLAIM, now=0)
        await asyncio.gather(layer.create_table(), other.create_table(), layer.create_table())
        await other.acquire(CLAIM, now=0)
        assert await layer.get("key") is not None


@dataclass
class SlowlyCreated:
    """A client whose table takes a while until it can be used."""

    status: str = ""
    waiting: int = 0

    async def create_table(self, **_request: Any) -> None:
        if self.status:
            raise answer("ResourceInUseException")
        self.status = "CREATING"

    async def describe_table(self, **_request: Any) -> Any:
        keys = [{"AttributeName": "id", "KeyType": "HASH"}]
        attributes = [{"AttributeName": "id", "AttributeType": "S"}]
        return {"Table": {"AttributeDefinitions": attributes, "KeySchema": keys, "TableStatus": self.status}}

    def get_waiter(self, name: str) -> Any:
        assert name == "table_exists"
        return self

    async def wait(self, **_options: Any) -> None:
        self.waiting += 1
        while self.waiting < 2:  # noqa: ASYNC110 - until both wait
            await asyncio.sleep(0)
        self.status = "ACTIVE"

    async def update_time_to_live(self, **_request: Any) -> None:
        assert self.status == "ACTIVE"


async def test_who_comes_second_to_create_a_table_waits_until_it_can_be_used() -> None:
    client = SlowlyCreated()
    layer = DynamoDBPersistenceLayer("payments", client=client)
    async with asyncio.timeout(5):
        await asyncio.gather(layer.create_table(), layer.create_table())
    assert client.waiting == 2
    await layer.create_table()
    assert client.waiting == 2


def test_what_is_set_on_a_layer_by_mistake_is_refused() -> None:
    layer: Any = DynamoDBPersistenceLayer("payments")
    with pytest.raises(AttributeError, match="client"):
        layer.client = FailingClient(KeyError())


async def test_a_table_that_may_not_be_created_is_refused() -> None:
    with pytest.raises(CONFIG, match="denied"):
        await failing(answer("AccessDeniedException")).create_table()


# --- The way there ----------------------------------------------------------------------------------------------------


async def test_no_server_is_an_outage(monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_DYNAMODB", f"http://127.0.0.1:{free_port()}")
    layer = DynamoDBPersistenceLayer("table", boto_config=ONCE)
    with pytest.raises(CONNECTION, match="EndpointConnectionError"):
        await layer.open()
    await layer.aclose()


async def test_no_credentials_are_a_matter_of_settings(monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name, raising=False)
    layer = DynamoDBPersistenceLayer("table")
    with pytest.raises(CONFIG, match="AWS_PROFILE"):
        await layer.open()
    await layer.aclose()


async def test_no_region_is_a_matter_of_settings(monkeypatch: pytest.MonkeyPatch, database: Database) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL_DYNAMODB"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(CONFIG, match="set AWS_DEFAULT_REGION"):
        await DynamoDBPersistenceLayer("table").open()


async def test_a_key_that_is_too_long_is_a_matter_of_settings(table: str, database: Database) -> None:
    layer = DynamoDBPersistenceLayer(table)
    with pytest.raises(CONFIG, match="shorter key_prefix"):
        await layer.acquire(claim_of("k" * 2049, now=0), now=0)
    await layer.aclose()


# --- Pages that are throttled -----------------------------------------------------------------------------------------


class ThrottlingClient:
    """Throttles some pages of a table before it answers, or fails otherwise."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = [*errors]
        self.asked = 0

    async def scan(self, **request: Any) -> Any:
        self.asked += 1
        if self.errors:
            raise self.errors.pop()
        return {"Items": [{"id": {"S": "key"}, "status": {"S": "COMPLETED"}}]}


class FastLoop(asyncio.SelectorEventLoop):
    """A thousand seconds last one: what pauses for seconds goes on at once."""

    def time(self) -> float:
        return super().time() * 1000


def listed(client: ThrottlingClient) -> list[str]:
    async def list_all() -> list[str]:
        layer = DynamoDBPersistenceLayer("payments", client=client)
        return [record.idempotency_key async for record in layer.scan()]

    with asyncio.Runner(loop_factory=FastLoop) as runner:
        return runner.run(list_all())


def test_a_page_that_is_throttled_is_asked_for_again() -> None:
    client = ThrottlingClient(answer("ThrottlingException"), answer("ProvisionedThroughputExceededException"))
    assert listed(client) == ["key"]
    assert client.asked == 3


def test_a_page_that_stays_throttled_fails() -> None:
    client = ThrottlingClient(*(answer("ThrottlingException") for _ in range(20)))
    with pytest.raises(IdempotencyPersistenceConnectionError, match="throttles"):
        listed(client)
    assert client.asked == 9


@pytest.mark.parametrize(("error", "kind"), [(OSError(), CONNECTION), (answer("AccessDeniedException"), CONFIG)])
def test_a_page_that_fails_otherwise_is_not_asked_for_again(error: Exception, kind: type[Exception]) -> None:
    client = ThrottlingClient(error)
    with pytest.raises(kind):
        listed(client)
    assert client.asked == 1
