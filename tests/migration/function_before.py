import os
from dataclasses import dataclass
from typing import Any

from aws_lambda_powertools.utilities.idempotency import (
    IdempotencyConfig,
    idempotent_function,
)
from aws_lambda_powertools.utilities.idempotency.persistence.cache import (
    CachePersistenceLayer,
)
from aws_lambda_powertools.utilities.idempotency.serialization.dataclass import (
    DataclassSerializer,
)

layer = CachePersistenceLayer(url=os.environ["REDIS_URL"])
config = IdempotencyConfig(event_key_jmespath="id", expires_after_seconds=86_400)
charges: list[str] = []  # stands for a bank


@dataclass
class Receipt:
    order: str


@idempotent_function(
    data_keyword_argument="order",
    persistence_store=layer,
    config=config,
    output_serializer=DataclassSerializer,
)
def charge(order: dict[str, Any]) -> Receipt:
    charges.append(order["id"])
    return Receipt(order["id"])


def handler(event: dict[str, Any], context: Any) -> list[str]:
    config.register_lambda_context(context)
    return [charge(order=order).order for order in event["orders"]]
