"""`aidem.opentelemetry`: what a collector gets to see of calls."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from aidem import IdempotencyConfig, idempotency, idempotent_function, sync
from aidem.exceptions import IdempotencyAlreadyInProgressError, IdempotencyError
from aidem.hooks import ENDINGS, EventKind, IdempotencyEvent, IdempotencyHook
from aidem.opentelemetry import LINKED_EXECUTIONS, OpenTelemetryHook
from aidem.persistence.memory import MemoryPersistenceLayer

ROOT = Path(__file__).parents[1]


class Collector:
    """A tracer and a meter that keep what they are told."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.tracers = TracerProvider(shutdown_on_exit=False)
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = self.tracers.get_tracer("the application")

    def hook(self) -> OpenTelemetryHook:
        return OpenTelemetryHook(tracer_provider=self.tracers, meter_provider=self.meters)

    def close(self) -> None:
        self.tracers.shutdown()
        self.meters.shutdown()

    @property
    def all_spans(self) -> tuple[ReadableSpan, ...]:
        return self._exporter.get_finished_spans()

    @property
    def spans(self) -> list[ReadableSpan]:
        """Those of aidem, in the order in which they ended."""
        return [span for span in self.all_spans if scope_of(span).name == "aidem"]

    @property
    def counts(self) -> dict[tuple[tuple[str, Any], ...], int]:
        """What the counter counted, by its attributes in alphabetical order."""
        points = self._points("aidem.events", unit="{event}")
        return {tuple(sorted(point.attributes.items())): point.value for point in points}

    @property
    def durations(self) -> list[Any]:
        """The points of the histogram."""
        return self._points("aidem.body.duration", unit="s")

    def _points(self, name: str, *, unit: str) -> list[Any]:
        data = self._reader.get_metrics_data()
        if data is None:
            return []
        scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
        metrics = [metric for scope in scopes for metric in scope.metrics if metric.name == name]
        assert {metric.unit for metric in metrics} <= {unit}
        return [point for metric in metrics for point in metric.data.data_points]


def scope_of(span: ReadableSpan) -> Any:
    return span.instrumentation_scope


def context_of(span: ReadableSpan) -> Any:
    return span.context


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture
def hook(collector: Collector) -> OpenTelemetryHook:
    return collector.hook()


@pytest.fixture
def options(hook: OpenTelemetryHook) -> dict[str, Any]:
    return {"persistence_store": MemoryPersistenceLayer(), "config": IdempotencyConfig(hooks=(hook,))}


async def charge(order: str) -> str:
    return f"receipt of {order}"


NAME = f"{__name__}.charge"


def event_of(kind: EventKind, **facts: Any) -> IdempotencyEvent:
    defaults: dict[str, Any] = {"key": "key", "function": NAME, "fence": 1, "duration_seconds": 0.0}
    if kind in ENDINGS:
        defaults["body_seconds"] = 0.2
    return IdempotencyEvent(kind=kind, **defaults | facts)


# --- Spans ------------------------------------------------------------------------------------------------------------


async def test_an_execution_is_a_span_within_that_of_its_caller_beside_those_of_its_body(
    collector: Collector, options: dict[str, Any]
) -> None:
    @idempotent_function(**options)
    async def refund() -> None:
        with collector.tracer.start_as_current_span("body"):
            await asyncio.sleep(0)

    with collector.tracer.start_as_current_span("caller"):
        await refund()
    body, execution, caller = collector.all_spans
    assert execution.name == f"idempotent {__name__}.{refund.__qualname__}"
    assert body.parent == execution.parent == context_of(caller)
    assert execution.status.status_code is trace.StatusCode.UNSET


def test_a_span_lasts_from_the_start_of_the_call_until_it_ended(collector: Collector) -> None:
    before = time.time_ns()
    collector.hook().on_event(event_of(EventKind.EXECUTED, duration_seconds=2.5))
    (span,) = collector.spans
    start, end = span.start_time or 0, span.end_time or 0
    assert end - start == 2_500_000_000
    assert before <= end <= time.time_ns()


async def test_a_span_says_what_happened_to_which_function_under_which_fence(
    collector: Collector, options: dict[str, Any]
) -> None:
    await idempotent_function(**options)(charge)("o-1")
    (span,) = collector.spans
    (record,) = options["persistence_store"].records().values()
    assert span.attributes == {"aidem.event": "executed", "code.function.name": NAME, "aidem.fence": record.fence}
    assert scope_of(span).schema_url == "https://opentelemetry.io/schemas/1.33.0"
    assert scope_of(span).version.startswith("0.")


async def test_a_replay_is_linked_to_the_execution_in_another_trace(
    collector: Collector, options: dict[str, Any]
) -> None:
    for _ in range(2):
        with collector.tracer.start_as_current_span("caller"):
            await idempotent_function(**options)(charge)("o-1")
    execution, replay = collector.spans
    assert replay.attributes is not None
    assert replay.attributes["aidem.event"] == "replayed"
    assert context_of(execution).trace_id != context_of(replay).trace_id
    assert [link.context for link in replay.links] == [context_of(execution)]
    assert not execution.links


async def test_a_replay_of_one_key_is_not_linked_to_another_nor_to_an_earlier_execution(collector: Collector) -> None:
    hook = collector.hook()
    for key, fence in [("one", 1), ("two", 1), ("one", 2)]:
        hook.on_event(event_of(EventKind.EXECUTED, key=key, fence=fence))
    hook.on_event(event_of(EventKind.REPLAYED, key="one", fence=2))
    *_, latest, replay = collector.spans
    assert [link.context for link in replay.links] == [context_of(latest)]


def test_a_replay_is_linked_across_event_loops_and_threads(collector: Collector, options: dict[str, Any]) -> None:
    async_charge = idempotent_function(key_prefix="charge", **options)(charge)

    @sync.idempotent_function(key_prefix="charge", **options)
    def charge_here(order: str) -> Any: ...

    asyncio.run(async_charge("o-1"))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(charge_here, "o-1").result() == "receipt of o-1"
    asyncio.run(async_charge("o-1"))
    execution, *replays = collector.spans
    assert [link.context for replay in replays for link in replay.links] == [context_of(execution)] * 2


async def test_the_recipe_of_the_docs_links_a_replay_in_another_process_to_the_caller_of_the_execution(
    collector: Collector,
) -> None:
    page = (ROOT / "docs" / "observing.md").read_text(encoding="utf-8")
    [recipe] = [code for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "link_to_execution" in code]
    scope: dict[str, Any] = {"IdempotencyConfig": IdempotencyConfig}
    exec(recipe, scope)
    store = MemoryPersistenceLayer()
    for _ in range(2):  # a function has no state that the second could know the first by
        with collector.tracer.start_as_current_span("caller"):
            await idempotent_function(persistence_store=store, config=scope["config"])(charge)("o-1")
    first, second = collector.all_spans
    assert not first.links
    assert [link.context.span_id for link in second.links] == [context_of(first).span_id]


async def test_a_replay_of_what_was_executed_elsewhere_has_no_link(
    collector: Collector, options: dict[str, Any]
) -> None:
    await idempotent_function(**options)(charge)("o-1")
    elsewhere = options | {"config": IdempotencyConfig(hooks=(collector.hook(),))}
    await idempotent_function(**elsewhere)(charge)("o-1")
    _execution, replay = collector.spans
    assert not replay.links


def test_the_latest_executions_are_remembered_and_no_more(collector: Collector) -> None:
    hook = collector.hook()
    for number in range(LINKED_EXECUTIONS + 1):
        hook.on_event(event_of(EventKind.EXECUTED, key=f"key-{number}"))
    for number in range(2):
        hook.on_event(event_of(EventKind.REPLAYED, key=f"key-{number}"))
    *_, forgotten, remembered = collector.spans
    assert (len(forgotten.links), len(remembered.links)) == (0, 1)


async def test_a_refused_call_is_an_error_of_a_type_without_its_message(
    collector: Collector, options: dict[str, Any]
) -> None:
    @idempotent_function(**options)
    async def again(order: str) -> None:
        await again(order)

    with pytest.raises(IdempotencyAlreadyInProgressError):
        await again("o-1")
    conflict, released = collector.spans
    assert conflict.status.status_code is trace.StatusCode.ERROR
    assert conflict.status.description is None
    assert not conflict.events
    assert dict(conflict.attributes or {}) == {
        "aidem.event": "conflict",
        "code.function.name": f"{__name__}.{again.__qualname__}",
        "aidem.fence": 0,
        "error.type": "aidem.exceptions.IdempotencyAlreadyInProgressError",
    }
    assert (released.attributes or {})["aidem.event"] == "released"


async def test_a_failed_body_is_an_error_that_says_where_and_not_with_which_message(
    collector: Collector, options: dict[str, Any]
) -> None:
    @idempotent_function(**options)
    async def decline(card: str) -> None:
        raise LookupError(f"no account for {card}")

    with pytest.raises(LookupError):
        await decline("4242")
    (span,) = collector.spans
    assert span.status.status_code is trace.StatusCode.ERROR
    assert span.status.description is None
    assert (span.attributes or {})["error.type"] == "builtins.LookupError"
    (event,) = span.events
    attributes = dict(event.attributes or {})
    assert (event.name, sorted(attributes)) == ("exception", ["exception.stacktrace", "exception.type"])
    assert attributes["exception.type"] == "builtins.LookupError"
    assert "raise LookupError(" in str(attributes["exception.stacktrace"])
    assert "4242" not in span.to_json()


async def test_a_cancelled_body_is_no_error(collector: Collector, options: dict[str, Any]) -> None:
    @idempotent_function(**options)
    async def hang() -> None:
        await asyncio.sleep(60)

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await hang()
    (span,) = collector.spans
    assert span.status.status_code is trace.StatusCode.UNSET
    assert not span.events
    assert (span.attributes or {})["error.type"] == "asyncio.exceptions.CancelledError"


async def test_a_stored_exception_is_an_error_of_an_execution(collector: Collector) -> None:
    config = IdempotencyConfig(hooks=(collector.hook(),), stored_exceptions=(LookupError,))

    @idempotent_function(persistence_store=MemoryPersistenceLayer(), config=config)
    async def decline() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await decline()
    (span,) = collector.spans
    assert (span.attributes or {})["aidem.event"] == "executed"
    assert span.status.status_code is trace.StatusCode.ERROR


async def test_a_block_is_an_operation_and_no_function(collector: Collector, options: dict[str, Any]) -> None:
    async with idempotency("key", key_prefix="charge", **options) as execution:
        execution.result = await execution.run(charge, "o-1")
    (span,) = collector.spans
    assert span.name == "idempotent block 'charge'"
    attributes = span.attributes or {}
    assert attributes["aidem.operation"] == "block 'charge'"
    assert "code.function.name" not in attributes


# --- The counter ------------------------------------------------------------------------------------------------------

WITH_SPAN = ENDINGS | {EventKind.REPLAYED, EventKind.CONFLICT}


@pytest.mark.parametrize("kind", EventKind)
def test_every_event_is_counted_and_one_that_ends_a_call_is_a_span(collector: Collector, kind: EventKind) -> None:
    hook = collector.hook()
    hook.on_event(event_of(kind))
    hook.on_event(event_of(kind, key="other", fence=2, duration_seconds=3))
    assert collector.counts == {(("aidem.event", kind.value), ("code.function.name", NAME)): 2}
    assert len(collector.spans) == (2 if kind in WITH_SPAN else 0)


def test_what_failed_is_counted_by_its_type(collector: Collector) -> None:
    hook = collector.hook()
    for error in (OSError("no route"), OSError("refused"), IdempotencyError("neither")):
        hook.on_event(event_of(EventKind.PERSISTENCE_ERROR, error=error))
    by_type = {dict(attributes)["error.type"]: count for attributes, count in collector.counts.items()}
    assert by_type == {"builtins.OSError": 2, "aidem.exceptions.IdempotencyError": 1}


@pytest.mark.parametrize("kind", EventKind)
def test_the_time_in_a_body_is_measured_with_every_ending(collector: Collector, kind: EventKind) -> None:
    hook = collector.hook()
    hook.on_event(event_of(kind))
    if kind not in ENDINGS:
        assert collector.durations == []
        return
    hook.on_event(event_of(kind, body_seconds=45.0))
    (point,) = collector.durations
    assert (point.count, point.sum) == (2, 45.2)
    assert dict(point.attributes) == {"aidem.event": kind.value, "code.function.name": NAME}


def test_the_buckets_are_those_of_seconds(collector: Collector) -> None:
    collector.hook().on_event(event_of(EventKind.EXECUTED))
    (point,) = collector.durations
    assert (point.explicit_bounds[0], point.explicit_bounds[-1]) == (0.005, 300)


# --- Both -------------------------------------------------------------------------------------------------------------


async def test_neither_key_nor_payload_nor_result_is_told(collector: Collector, options: dict[str, Any]) -> None:
    @idempotent_function(key_prefix="charge", **options)
    async def again(order: str) -> str:
        if order == "nested":
            await again(order)
        return "Ada Lovelace"

    for order in ("4242 4242 4242 4242", "4242 4242 4242 4242", "nested"):
        with collector.tracer.start_as_current_span("caller"):
            try:
                await again(order)
            except IdempotencyAlreadyInProgressError as error:
                digest = str(error.key).partition("#")[2]
    told = "".join(span.to_json() for span in collector.spans) + repr(collector.counts)
    assert "conflict" in told
    assert "replayed" in told
    keys = [key.partition("#")[2] for key in options["persistence_store"].records()]
    for secret in ("4242", "Ada", digest, *keys):
        assert secret not in told


def test_it_is_a_hook_that_works_without_anything_set_up() -> None:
    hook = OpenTelemetryHook()
    assert isinstance(hook, IdempotencyHook)
    hook.on_event(event_of(EventKind.EXECUTED))
    hook.on_event(event_of(EventKind.REPLAYED))


def test_what_is_missing_is_said_in_one_sentence() -> None:
    code = "import sys; sys.modules['opentelemetry'] = None; import aidem.opentelemetry"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    last_line = run.stderr.splitlines()[-1]
    assert last_line.startswith(
        "ImportError: aidem.opentelemetry needs the API of OpenTelemetry: install aidem-idempotency[otel],"
    )
