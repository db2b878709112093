"""The table itself: found wrong before the first call, and made for development."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence.dynamodb._errors import DENIED, THROTTLED, code_of

if TYPE_CHECKING:
    from aidem.persistence.dynamodb._items import Attributes
    from aidem.persistence.dynamodb._requests import Requests

logger = logging.getLogger("aidem")

IN_USE: Final = "ResourceInUseException"
MISSING: Final = "ResourceNotFoundException"
CREATING: Final = "CREATING"
POLL_SECONDS: Final = 1


async def check(client: Any, requests: Requests, *, may_be_missing: bool = False) -> str | None:
    """Find out whether the table exists and has the keys of a layer; who may not look goes on.

    Returns:
        The status of the table; None where that is not known, or where there is no table and there may be none.

    Raises:
        IdempotencyPersistenceConfigError: It has other keys.
        Exception: What the client raises, for a missing table among others.
    """
    table_name = requests.table_name
    try:
        description = (await client.describe_table(TableName=table_name))["Table"]
    except Exception as error:
        code = code_of(error)
        if may_be_missing and code == MISSING:
            logger.warning(
                "DynamoDB table %r does not exist yet: until it is created, for development with "
                "`await layer.create_table()`, every call fails before its function runs",
                table_name,
            )
            return None
        if code in DENIED | THROTTLED:  # which says nothing about the table
            return None
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
    return str(description["TableStatus"])


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
        if await check(client, requests) == CREATING:  # somebody else has asked for it at the same time
            await _until_usable(client, table_name)
        return
    await _until_usable(client, table_name)
    await client.update_time_to_live(
        TableName=table_name,
        TimeToLiveSpecification={"Enabled": True, "AttributeName": requests.attributes.expiry},
    )


async def _until_usable(client: Any, table_name: str) -> None:
    await client.get_waiter("table_exists").wait(TableName=table_name, WaiterConfig={"Delay": POLL_SECONDS})


def _keys(attributes: Attributes) -> dict[str, str]:
    if attributes.sort_key is None:
        return {"HASH": attributes.key}
    return {"HASH": attributes.key, "RANGE": attributes.sort_key}


def _shown(keys: dict[str, tuple[str, str]]) -> str:
    return ", ".join(f"{kind} {name!r} ({attribute_type})" for kind, (name, attribute_type) in sorted(keys.items()))
