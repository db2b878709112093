"""What tests of Lambda handlers share."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from tests.support.aws_servers import database, ministack_url, moto_url, table
from tests.support.planned import VirtualTimeLoop

__all__ = ["database", "ministack_url", "moto_url", "table"]


class _VirtualTimePolicy(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return VirtualTimeLoop()


@pytest.fixture
def virtual_time() -> Iterator[None]:
    """Let the loops that are made during the test wait without taking time."""
    before = asyncio.get_event_loop_policy()  # type: ignore[deprecated] # not before Python 3.14
    asyncio.set_event_loop_policy(_VirtualTimePolicy())  # type: ignore[deprecated]
    yield
    asyncio.set_event_loop_policy(before)  # type: ignore[deprecated]
