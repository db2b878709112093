"""Fixtures that start servers."""

from __future__ import annotations

from tests.support.aws_servers import database, ministack_url, moto_url, table

__all__ = ["database", "ministack_url", "moto_url", "table"]
