"""Fixtures that start servers."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from tests.support.aws_servers import database, ministack_url, moto_url, table

__all__ = ["database", "ministack_url", "moto_url", "table", "vacant_port"]


@pytest.fixture
def vacant_port() -> Iterator[int]:
    """A port where nobody answers, nor will: it is taken, by one that does not listen."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        yield port
