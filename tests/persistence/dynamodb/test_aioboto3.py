"""Sessions and clients of aioboto3; everything else is also tested without it."""

from __future__ import annotations

import aioboto3
import pytest

from aidem._rules.lifecycle import Claimed
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.testing import claim_of
from tests.support.aws_servers import Database

pytestmark = [pytest.mark.server, pytest.mark.timeout(60, func_only=True)]

CLAIM = claim_of("key", now=0)


async def test_a_session_of_aioboto3_makes_the_client(
    table: str, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_DEFAULT_REGION", raising=False)
    session = aioboto3.Session(region_name=database.client.meta.region_name)
    async with DynamoDBPersistenceLayer(table, session=session) as layer:
        assert isinstance(await layer.acquire(CLAIM, now=0), Claimed)


async def test_a_client_of_aioboto3_is_used_as_it_is(table: str) -> None:
    async with aioboto3.Session().client("dynamodb") as client:
        async with DynamoDBPersistenceLayer(table, client=client) as layer:
            assert isinstance(await layer.acquire(CLAIM, now=0), Claimed)
        assert (await client.get_item(TableName=table, Key={"id": {"S": "key"}}))["Item"]["owner"] == {"S": "ours"}
