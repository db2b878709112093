"""Every example in the README and the docs is run as a test, in a directory of its own."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from sybil import Sybil
from sybil.integration.pytest import SybilItem
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

import aidem

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


ROOT = Path(__file__).parent
# Files are shared out between processes: one of these, left for the end, would run while the other processes are idle.
LONGEST = [
    "tests/persistence/dynamodb/test_dynamodb.py",
    "tests/testing/test_crash_everywhere.py",
    "tests/simulation/test_simulation.py",
    "tests/persistence/redis/test_cluster.py",
    "tests/test_command.py",
    "tests/test_runbook.py",
    "tests/sync/test_greenlets.py",
    "tests/http/test_uvicorn.py",
    "tests/persistence/dynamodb/test_torture.py",
    "tests/awslambda/test_runtime.py",
    "tests/persistence/postgres/test_torture.py",
    "tests/persistence/sqlite/test_torture.py",
    "tests/persistence/dynamodb/test_client.py",
    "tests/differential/test_differential.py",
    "tests/persistence/redis/test_connection.py",
    "tests/persistence/redis/test_faults.py",
    "tests/persistence/redis/test_failover.py",
    "tests/persistence/redis/test_sentinel.py",
    "tests/http/test_uvicorn_ends.py",
    "tests/persistence/dynamodb/test_processes.py",
    "tests/sync/test_interrupts.py",
    "tests/sync/test_processes.py",
    "tests/processes/test_shop.py",
    "tests/processes/test_checkout.py",
    "tests/processes/test_processes.py",
    "tests/persistence/postgres/test_faults.py",
    "tests/persistence/postgres/test_connections.py",
    "tests/http/test_examples.py",
    "tests/stateful/test_stateful.py",
    "tests/testing/test_crash_servers.py",
    "tests/testing/test_crash_databases.py",
    "tests/testing/test_documented_handlers.py",
    "tests/persistence/sqlite/test_processes.py",
    "tests/persistence/sqlite/test_transactions.py",
    "tests/runtime/test_cancellation.py",
    "tests/awslambda/test_processes.py",
    "tests/awslambda/test_durable.py",
]
# Coverage doubles the time of a test. It is not measured in these, which execute no line that no other test executes.
UNMEASURED = (
    "tests/differential",
    "tests/http/test_examples.py",
    "tests/http/test_generated_client.py",
    "tests/http/test_schemathesis.py",
    "tests/http/test_uvicorn.py",
    "tests/migration",
    "tests/persistence/postgres/test_conformance.py::TestPgBouncer",
    "tests/persistence/postgres/test_conformance.py::TestRepeatableRead",
    "tests/persistence/postgres/test_conformance.py::TestSerializable",
    "tests/recipes",
    "tests/runtime/test_cancellation.py::test_a_caller_cancelled_while_it_polls_a_foreign_owner_leaves_nothing",
    "tests/runtime/test_cancellation.py::test_a_cancelled_completion_that_fails_at_first_is_still_completed",
    "tests/runtime/test_cancellation.py::test_a_waiter_that_is_cancelled_leaves_the_owner_and_other_waiters_alone",
    "tests/simulation",
    "tests/stateful",
    "tests/test_benchmarks.py",
    "tests/test_docs.py",
    "tests/testing/test_crash_servers.py",
    "tests/testing/test_documented_handlers.py",
)
SECOND_SERVERS = {"moto", "valkey"}
"""Parameters of tests that run on another server, too."""
IS_MEASURED = "COVERAGE_PROCESS_CONFIG" in os.environ


@contextlib.contextmanager
def _without_coverage() -> Iterator[None]:
    """Trace neither this thread nor new threads and processes."""
    trace, trace_of_threads = sys.gettrace(), threading.gettrace()
    configuration = os.environ.pop("COVERAGE_PROCESS_CONFIG")
    sys.settrace(None)
    threading.settrace(None)
    try:
        yield
    finally:
        os.environ["COVERAGE_PROCESS_CONFIG"] = configuration
        threading.settrace(trace_of_threads)
        sys.settrace(trace)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, Any, Any]:
    """Import aidem with coverage, and the tests, which takes several times as long, without.

    No garbage is looked for meanwhile, and never among the tests: that would take a third of a second each time.
    """
    if IS_MEASURED:
        for module in pkgutil.walk_packages(aidem.__path__, "aidem."):
            importlib.import_module(module.name)
    gc.disable()
    try:
        with _without_coverage() if IS_MEASURED else contextlib.nullcontext():
            return (yield)
    finally:
        gc.enable()
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    """Run a test with coverage, if it may execute a line that no other does."""
    if not _is_unmeasured(item):
        return (yield)
    with _without_coverage():
        return (yield)


def _is_unmeasured(item: pytest.Item) -> bool:
    if not IS_MEASURED:
        return False
    parameters = item.name.partition("[")[2].removesuffix("]").split("-")
    return item.nodeid.startswith(UNMEASURED) or not SECOND_SERVERS.isdisjoint(parameters)


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
    """Keep the examples of a document in their order, whatever is shuffled; begin with the files that take longest.

    What is not measured comes last, as a line that a process executes only once is to be executed with coverage.
    """
    places = [place for place, item in enumerate(items) if isinstance(item, SybilItem)]
    examples = [item for item in items if isinstance(item, SybilItem)]
    examples.sort(key=lambda item: (item.example.path, item.example.line))
    for place, example in zip(places, examples, strict=True):
        items[place] = example
    places_of_files = {ROOT / file: place for place, file in enumerate(LONGEST)}
    items.sort(key=lambda item: (_is_unmeasured(item), places_of_files.get(item.path, len(LONGEST))))
