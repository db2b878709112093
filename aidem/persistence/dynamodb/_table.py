"""The table itself: found wrong before the first call, and made for development."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from aidem.exceptions import IdempotencyPersistenceConfigError
from aidem.persistence import Diagnosis
from aidem.persistence._diagnosis import clock_fact, clock_problems
from aidem.persistence.dynamodb._errors import DENIED, THROTTLED, code_of

if TYPE_CHECKING:
    from aidem.persistence.dynamodb._items import Attributes
    from aidem.persistence.dynamodb._requests import Requests

logger = logging.getLogger("aidem")

IN_USE: Final = "ResourceInUseException"
MISSING: Final = "ResourceNotFoundException"
CREATING: Final = "CREATING"
POLL_SECONDS: Final = 1
NOT_SHOWN: Final = "not shown to this role"


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
    found = _keys_in(description)
    wanted = {kind: (name, "S") for kind, name in _keys(requests.attributes).items()}
    if found != wanted:
        raise IdempotencyPersistenceConfigError(
            f"DynamoDB table {table_name!r} has the keys {_shown(found)}, the layer expects {_shown(wanted)}; "
            "set key_attr and sort_key_attr to the table's, or create a table with these keys"
        )
    return str(description["TableStatus"])


async def diagnosis(client: Any, requests: Requests, *, ahead_seconds: float) -> Diagnosis:
    """Return what the table is, as far as the role may know, and what endangers the records in it; see `check`."""
    table_name, expiry = requests.table_name, requests.attributes.expiry
    await check(client, requests)
    description = await _described(client.describe_table, table_name, "Table")
    ttl = await _described(client.describe_time_to_live, table_name, "TimeToLiveDescription")
    backups = await _described(client.describe_continuous_backups, table_name, "ContinuousBackupsDescription")
    status = description.get("TableStatus", NOT_SHOWN)
    regions = [replica.get("RegionName", "") for replica in description.get("Replicas", ())]
    point_in_time = backups.get("PointInTimeRecoveryDescription", {}).get("PointInTimeRecoveryStatus", NOT_SHOWN)
    billing = description.get("BillingModeSummary", {}).get("BillingMode", "PROVISIONED")
    facts = {
        "table": f"{table_name}, {status}",
        "keys": _shown(_keys_in(description)) if description else NOT_SHOWN,
        "items": f"about {description['ItemCount']}, as of the last hours" if "ItemCount" in description else NOT_SHOWN,
        "billing": billing if description else NOT_SHOWN,
        "TTL": " on ".join(filter(None, (ttl.get("TimeToLiveStatus"), ttl.get("AttributeName")))) or NOT_SHOWN,
        "point-in-time recovery": point_in_time,
        "replicas in other regions": ", ".join(regions) or "none",
        "clock of this machine": clock_fact(ahead_seconds),
    }
    problems = [
        *clock_problems(ahead_seconds, danger="leases are judged by clocks of callers, and calls may run twice")
    ]
    if status not in {NOT_SHOWN, "ACTIVE", "UPDATING"}:
        problems.append(f"the table is {status}: calls fail until it is ACTIVE")
    if ttl and not ttl.get("TimeToLiveStatus", "").startswith("ENABL"):
        problems.append(f"TTL is off: expired records are never removed, and the table grows; enable it on {expiry!r}")
    elif ttl and ttl.get("AttributeName") != expiry:
        problems.append(
            f"TTL is on {ttl.get('AttributeName')!r}, and records expire by {expiry!r}: they are removed too early or "
            f"never; enable it on {expiry!r}, or set expiry_attr"
        )
    if regions and description.get("MultiRegionConsistency") != "STRONG":
        problems.append(
            f"the table has replicas in {', '.join(regions)}, which agree only after a while: two regions can claim "
            "one key; keep the calls of a key in one region, or use multi-region strong consistency"
        )
    return Diagnosis(facts, tuple(problems))


async def _described(describe: Any, table_name: str, name: str) -> dict[str, Any]:
    """Return what the service tells about a table; nothing where it may not be asked, or does not know the question."""
    try:
        description: dict[str, Any] = (await describe(TableName=table_name))[name]
    except Exception as error:
        if not code_of(error):
            raise
        return {}
    return description


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


def _keys_in(description: dict[str, Any]) -> dict[str, tuple[str, str]]:
    types = {each["AttributeName"]: each["AttributeType"] for each in description["AttributeDefinitions"]}
    return {key["KeyType"]: (key["AttributeName"], types[key["AttributeName"]]) for key in description["KeySchema"]}


def _shown(keys: dict[str, tuple[str, str]]) -> str:
    return ", ".join(f"{kind} {name!r} ({attribute_type})" for kind, (name, attribute_type) in sorted(keys.items()))
