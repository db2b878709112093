"""Every example in the README and the docs is run as a test, in a directory of its own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

if TYPE_CHECKING:
    from collections.abc import Iterator


ROOT = Path(__file__).parent
# Files are shared out between processes: one of these, left for the end, would run while the other processes are idle.
LONGEST = [
    "tests/sync/test_greenlets.py",
    "tests/simulation/test_simulation.py",
    "tests/awslambda/test_runtime.py",
    "tests/persistence/sqlite/test_torture.py",
    "tests/persistence/postgres/test_torture.py",
    "tests/persistence/dynamodb/test_torture.py",
    "tests/persistence/redis/test_cluster.py",
    "tests/test_command.py",
    "tests/test_runbook.py",
    "tests/http/test_uvicorn.py",
    "tests/http/test_uvicorn_ends.py",
    "tests/persistence/redis/test_connection.py",
    "tests/persistence/redis/test_faults.py",
    "tests/persistence/redis/test_failover.py",
    "tests/persistence/dynamodb/test_client.py",
    "tests/persistence/dynamodb/test_dynamodb.py",
    "tests/persistence/dynamodb/test_processes.py",
    "tests/differential/test_differential.py",
    "tests/processes/test_shop.py",
    "tests/http/test_examples.py",
    "tests/sync/test_processes.py",
    "tests/stateful/test_stateful.py",
    "tests/persistence/sqlite/test_processes.py",
    "tests/awslambda/test_durable.py",
    "tests/persistence/redis/test_sentinel.py",
    "tests/sync/test_interrupts.py",
]


@pytest.fixture(scope="module")
def in_empty_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Let a document's examples write their files where they are thrown away."""
    before = Path.cwd()
    directory = tmp_path_factory.mktemp("examples")
    os.chdir(directory)
    yield directory
    os.chdir(before)


pytest_collect_file: Any = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md"],
    fixtures=["in_empty_directory"],
).pytest()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the examples of a document in their order, whatever is shuffled; begin with the files that take longest."""
    places = [place for place, item in enumerate(items) if isinstance(item, SybilItem)]
    examples = [item for item in items if isinstance(item, SybilItem)]
    examples.sort(key=lambda item: (item.example.path, item.example.line))
    for place, example in zip(places, examples, strict=True):
        items[place] = example
    places_of_files = {ROOT / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: places_of_files.get(item.path, len(LONGEST)))
