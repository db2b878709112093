import os
from dataclasses import dataclass
from typing import Any

from aidem import IdempotencyConfig
from aidem.persistence.redis import RedisPersistenceLayer
from aidem.sync import idempotent_function

layer = RedisPersistenceLayer(os.environ["REDIS_URL"])
config = IdempotencyConfig(
    event_key_jmespath="id",
    expires_after_seconds=86_400,
    hash_function="md5",
)
charges: list[str] = []  # stands for a bank


@dataclass
class Receipt:
    order: str


@idempotent_function(
    data_keyword_argument="order",
    persistence_store=layer,
    config=config,
)
def charge(order: dict[str, Any]) -> Receipt:
    charges.append(order["id"])
    return Receipt(order["id"])


def handler(event: dict[str, Any], context: Any) -> list[str]:
    config.register_lambda_context(context)
    return [charge(order).order for order in event["orders"]]
