"""The table itself: found wrong before the first call, and made for development."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence._dynamodb_errors import DENIED, THROTTLED, code_of

if TYPE_CHECKING:
    from aidem.persistence._dynamodb_items import Attributes
    from aidem.persistence._dynamodb_requests import Requests

IN_USE: Final = "ResourceInUseException"
POLL_SECONDS: Final = 1


async def check(client: Any, requests: Requests) -> None:
    """Find out whether the table exists and has the keys of a layer; who may not look goes on.

    Raises:
        IdempotencyPersistenceConfigError: It has other keys.
        Exception: What the client raises, for a missing table among others.
    """
    table_name = requests.table_name
    try:
        description = (await client.describe_table(TableName=table_name))["Table"]
    except Exception as error:
        if code_of(error) in DENIED | THROTTLED:  # which says nothing about the table
            return
        raise
    types = {
        definition["AttributeName"]: definition["AttributeType"] for definition in description["AttributeDefinitions"]
    }
    found = {key["KeyType"]: (key["AttributeName"], types[key["AttributeName"]]) for key in description["KeySchema"]}
    wanted = {kind: (name, "S") for kind, name in _keys(requests.attributes).items()}
    if found != wanted:
        raise IdempotencyPersistenceConfigError(
            f"DynamoDB table {table_name!r} has the keys {_shown(found)}, the layer expects {_shown(wanted)}; "
            "set key_attr and sort_key_attr to the table's, or create a table with these keys"
        )


async def create(client: Any, requests: Requests) -> None:
    """Create the table unless it exists, wait until it can be used, and have expired items removed."""
    table_name, keys = requests.table_name, _keys(requests.attributes)
    try:
        await client.create_table(
            TableName=table_name,
            KeySchema=[{"AttributeName": name, "KeyType": kind} for kind, name in keys.items()],
            AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in keys.values()],
            BillingMode="PAY_PER_REQUEST",
        )
    except Exception as error:
        if code_of(error) != IN_USE:
            raise
        await check(client, requests)
        return
    await client.get_waiter("table_exists").wait(TableName=table_name, WaiterConfig={"Delay": POLL_SECONDS})
    await client.update_time_to_live(
        TableName=table_name,
        TimeToLiveSpecification={"Enabled": True, "AttributeName": requests.attributes.expiry},
    )


def _keys(attributes: Attributes) -> dict[str, str]:
    if attributes.sort_key is None:
        return {"HASH": attributes.key}
    return {"HASH": attributes.key, "RANGE": attributes.sort_key}


def _shown(keys: dict[str, tuple[str, str]]) -> str:
    return ", ".join(f"{kind} {name!r} ({attribute_type})" for kind, (name, attribute_type) in sorted(keys.items()))
