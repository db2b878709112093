"""Fixtures that start servers."""

from __future__ import annotations

from tests.aws_servers import table
from tests.differential.conftest import database, moto_url

__all__ = ["database", "moto_url", "table"]
