"""Fixtures that start servers."""

from __future__ import annotations

import pytest

from tests.support.aws_servers import OTHER_URL, Database, moto_url

__all__ = ["database", "moto_url"]


@pytest.fixture
def database(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Database:
    """Point the AWS environment at an emulator."""
    database = Database(OTHER_URL or request.getfixturevalue("moto_url"))
    for name, value in database.environment.items():
        monkeypatch.setenv(name, value)
    return database
