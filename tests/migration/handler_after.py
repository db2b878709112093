import os
from typing import Any

import aioboto3

from aidem import IdempotencyConfig
from aidem.persistence.dynamodb import DynamoDBPersistenceLayer
from aidem.sync import idempotent

session = aioboto3.Session(region_name="eu-central-1")
layer = DynamoDBPersistenceLayer(
    table_name=os.environ["IDEMPOTENCY_TABLE"],
    session=session,
)
config = IdempotencyConfig(event_key_jmespath="order_id", hash_function="md5")
charges: list[str] = []  # stands for a bank


@idempotent(persistence_store=layer, config=config)
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    charges.append(event["order_id"])
    return {"statusCode": 200, "body": f"charged {event['order_id']}"}
