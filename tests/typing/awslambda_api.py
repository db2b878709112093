"""`aidem.awslambda` as type checkers see it: checked by mypy and pyright, never run.

Wrong use is an error there: every `ignore` below is one, and both checkers report an `ignore` that nothing needs.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Callable
from typing import assert_type

from aidem import idempotent
from aidem.awslambda import lambda_handler
from aidem.persistence.memory import MemoryPersistenceLayer

Event = dict[str, str]


class LambdaContext:
    def get_remaining_time_in_millis(self) -> int:
        return 0


layer = MemoryPersistenceLayer()


@lambda_handler
async def bare_handler(event: Event, context: LambdaContext) -> int:
    return 1


@lambda_handler(warm=[layer])
@idempotent(persistence_store=layer)
async def handler(event: Event, context: LambdaContext) -> list[str]:
    return []


assert_type(bare_handler({}, LambdaContext()), int)
assert_type(handler({}, LambdaContext()), list[str])
handler_type: Callable[[Event, LambdaContext], int] = bare_handler
handler({}, 3)  # type: ignore[arg-type]
handler({})  # type: ignore[call-arg]


async def asynchronous(event: Event, context: LambdaContext) -> str:
    return ""


def plain(event: Event, context: LambdaContext) -> str:
    return ""


assert_type(lambda_handler(asynchronous, warm=(layer,))({}, LambdaContext()), str)
lambda_handler(plain)  # type: ignore[arg-type]
lambda_handler(asynchronous, warm=layer)  # type: ignore[call-overload]
lambda_handler(warm=["redis://localhost"])  # type: ignore[list-item]
