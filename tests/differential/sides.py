"""The two libraries under the same names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import aws_lambda_powertools.utilities.idempotency as powertools
from aws_lambda_powertools.utilities.idempotency.serialization import custom_dict, pydantic
from aws_lambda_powertools.utilities.idempotency.serialization import dataclass as dataclasses

import aidem
from aidem import serialization, sync


@dataclass(frozen=True, kw_only=True)
class Side:
    """One library.

    Attributes:
        name: `powertools` or `aidem`.
        defaults: Settings that stand for "as the other".
    """

    name: str
    idempotent: Callable[..., Any]
    idempotent_function: Callable[..., Any]
    config: Callable[..., Any]
    defaults: dict[str, Any]
    PydanticSerializer: Any
    DataclassSerializer: Any
    CustomDictSerializer: Any


POWERTOOLS = Side(
    name="powertools",
    idempotent=powertools.idempotent,
    idempotent_function=powertools.idempotent_function,
    config=powertools.IdempotencyConfig,
    defaults={},
    PydanticSerializer=pydantic.PydanticSerializer,
    DataclassSerializer=dataclasses.DataclassSerializer,
    CustomDictSerializer=custom_dict.CustomDictSerializer,
)
AIDEM = Side(
    name="aidem",
    idempotent=sync.idempotent,
    idempotent_function=sync.idempotent_function,
    config=aidem.IdempotencyConfig,
    defaults={"hash_function": "md5"},
    PydanticSerializer=serialization.PydanticSerializer,
    DataclassSerializer=serialization.DataclassSerializer,
    CustomDictSerializer=serialization.CustomDictSerializer,
)


@dataclass(frozen=True)
class Of:
    """A name that each side defines for itself, with arguments if it is to be called."""

    name: str
    arguments: tuple[Any, ...] = ()

    def on(self, side: Side) -> Any:
        value = getattr(side, self.name)
        return value(*self.arguments) if self.arguments else value
