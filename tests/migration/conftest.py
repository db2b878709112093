"""Fixtures that start servers."""

from __future__ import annotations

from tests.differential.conftest import database, moto_url
from tests.support.aws_servers import table

__all__ = ["database", "moto_url", "table"]
