"""Every module loads what it needs and nothing else: on Lambda, imports are what a cold start is made of."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

CLIENTS_OF_AWS = {"aioboto3", "aiobotocore", "boto3", "botocore"}
CLIENTS_OF_REDIS = {"hiredis", "redis"}
FRAMEWORKS = {"aws_lambda_powertools", "fastapi", "pydantic", "starlette", "uvicorn"}
CLIENTS_OF_POSTGRES = {"asyncpg", "psycopg", "psycopg_pool", "sqlalchemy"}
EXTRAS = CLIENTS_OF_AWS | CLIENTS_OF_REDIS | CLIENTS_OF_POSTGRES | FRAMEWORKS | {"opentelemetry", "prometheus_client"}
UNUSED = EXTRAS | {"anyio", "jmespath", "sqlite3"}

HANDLER = """
from aidem import IdempotencyConfig, sync
from aidem.persistence.memory import MemoryPersistenceLayer

@sync.idempotent(persistence_store=MemoryPersistenceLayer(), config=IdempotencyConfig({settings}))
def handler(event, context):
    return {{"statusCode": 200}}

assert handler({{"id": 1}}, None) == handler({{"id": 1}}, None)
"""


@pytest.mark.parametrize(
    ("module", "needed", "unused"),
    [
        ("aidem", set(), UNUSED),
        ("aidem.sync", set(), UNUSED),
        ("aidem.awslambda", set(), UNUSED),
        ("aidem.asgi", set(), UNUSED),
        ("aidem.exceptions", set(), UNUSED),
        ("aidem.serialization", set(), UNUSED),
        ("aidem.persistence", set(), UNUSED),
        ("aidem.persistence.memory", set(), UNUSED),
        ("aidem.persistence.sqlite", {"sqlite3"}, UNUSED - {"sqlite3"}),
        # What a client loads besides, such as OpenTelemetry where it is installed, is its own affair.
        ("aidem.persistence.redis", {"redis"}, UNUSED - CLIENTS_OF_REDIS - {"opentelemetry"}),
        # asyncpg is loaded for a URL; a pool brings its own driver.
        ("aidem.persistence.postgres", set(), UNUSED),
        (
            "aidem.persistence.dynamodb",
            {"aiobotocore"},
            {"aioboto3", "anyio", "boto3", "sqlite3"} | CLIENTS_OF_REDIS | CLIENTS_OF_POSTGRES | FRAMEWORKS,
        ),
    ],
)
def test_a_module_loads_what_it_needs_and_nothing_else(module: str, needed: set[str], unused: set[str]) -> None:
    loaded = packages_loaded_by(f"import {module}")
    assert needed <= loaded
    assert loaded & unused == set()


def test_a_handler_loads_jmespath_only_for_an_expression() -> None:
    assert packages_loaded_by(HANDLER.format(settings="")) & UNUSED == set()
    assert packages_loaded_by(HANDLER.format(settings='event_key_jmespath="id"')) & UNUSED == {"jmespath"}


def packages_loaded_by(code: str) -> set[str]:
    """Return the packages that a fresh interpreter loads for a piece of code, as it reports them itself."""
    # What measures coverage in child processes loads modules of its own.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, "-X", "importtime", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {name.partition(".")[0] for name in re.findall(r"^import time: .*\| +([\w.]+)$", done.stderr, re.MULTILINE)}
