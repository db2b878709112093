"""What all layers do alike when their records are listed."""

from __future__ import annotations

from contextlib import aclosing
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable

    from aidem._rules.record import DataRecord, RecordStatus

RECORDS_PER_PAGE: Final = 100
"""How many records are read at once: calls of the service wait for no more than that."""


async def selected(
    pages: AsyncGenerator[Iterable[DataRecord]], *, status: RecordStatus | None, limit: int | None
) -> AsyncGenerator[DataRecord]:
    """Hand out the records of pages with a status, or of any, and no more than the limit."""
    left = limit
    async with aclosing(pages):
        if left == 0:
            return
        async for page in pages:
            for record in page:
                if status is None or record.status is status:
                    yield record
                    if left is not None:
                        left -= 1
                        if left == 0:
                            return
