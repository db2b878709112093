"""`process_batch` as type checkers see it: checked by mypy and pyright, never run.

Wrong use is an error there: every `ignore` below is one, and both checkers report an `ignore` that nothing needs.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from types import MappingProxyType
from typing import Any, assert_type

from aidem import idempotent_function
from aidem.awslambda import process_batch

Record = dict[str, Any]


async def charge(record: Record) -> int:
    return 1


@idempotent_function(data_keyword_argument="record")
async def charge_once(record: Record) -> None: ...


def charge_blocking(record: Record) -> int:
    return 1


async def charge_two(record: Record, other: Record) -> int:
    return 1


async def handler(event: Record, context: object) -> dict[str, list[dict[str, str]]]:
    assert_type(await process_batch(event, charge), dict[str, list[dict[str, str]]])
    await process_batch(event, charge_blocking)  # type: ignore[arg-type]
    await process_batch(event, charge_two)  # type: ignore[arg-type]
    await process_batch(event, charge, max_concurrency="10")  # type: ignore[arg-type]
    await process_batch(event, charge, 10)  # type: ignore[call-arg]
    return await process_batch(MappingProxyType(event), charge_once, max_concurrency=3, time_reserve_seconds=2)
