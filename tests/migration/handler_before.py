import os
from typing import Any

import boto3
from aws_lambda_powertools.utilities.idempotency import (
    DynamoDBPersistenceLayer,
    IdempotencyConfig,
    idempotent,
)

session = boto3.Session(region_name="eu-central-1")
layer = DynamoDBPersistenceLayer(
    table_name=os.environ["IDEMPOTENCY_TABLE"],
    boto3_session=session,
)
config = IdempotencyConfig(event_key_jmespath="order_id")
charges: list[str] = []  # stands for a bank


@idempotent(persistence_store=layer, config=config)
def handler(event: dict[str, Any], context: Any) -> dict[str, Any]:
    charges.append(event["order_id"])
    return {"statusCode": 200, "body": f"charged {event['order_id']}"}
