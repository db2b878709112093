"""A hook for OpenTelemetry: counts events, measures bodies, makes spans of calls, and links replays to executions.

Names follow the semantic conventions: https://opentelemetry.io/docs/specs/semconv/
"""

from __future__ import annotations

import time
import traceback
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from aidem._distribution import __version__, how_to_install

try:
    from opentelemetry import metrics, trace
except ModuleNotFoundError as missing:
    message = f"aidem.opentelemetry needs the API of OpenTelemetry: {how_to_install('otel')}"
    raise ImportError(message) from missing

from aidem._runtime.fork import ForkSafeLock
from aidem.hooks import ENDINGS, EventKind

if TYPE_CHECKING:
    from aidem.hooks import IdempotencyEvent

__all__ = ["OpenTelemetryHook"]

SCHEMA_URL: Final = "https://opentelemetry.io/schemas/1.33.0"
"""The version of the conventions in which `code.function.name` became stable."""

LINKED_EXECUTIONS: Final = 4096
"""The number of executions whose spans are kept, for links from their replays."""

_WITH_SPAN: Final = ENDINGS | {EventKind.REPLAYED, EventKind.CONFLICT}

# Those of the semantic conventions for requests, which last as long as many bodies, and some more.
_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0, 300.0)


class OpenTelemetryHook:
    """Counts every event, measures bodies, and makes a span of each claim that has ended, each replay and each refusal.

    A replay is linked to the span of the execution if that ran in this process with the same hook, so use one hook for
    all configs. No attribute contains a key, payload, result or message of an exception.

    Args:
        tracer_provider: Makes the spans. Default: the global one.
        meter_provider: Makes the counter and the histogram. Default: the global one.
    """

    def __init__(
        self,
        *,
        tracer_provider: trace.TracerProvider | None = None,
        meter_provider: metrics.MeterProvider | None = None,
    ) -> None:
        self._tracer = trace.get_tracer("aidem", __version__, tracer_provider, SCHEMA_URL)
        meter = metrics.get_meter("aidem", __version__, meter_provider, SCHEMA_URL)
        self._events = meter.create_counter("aidem.events", unit="{event}", description="What happened to calls.")
        self._bodies = meter.create_histogram(
            "aidem.body.duration",
            unit="s",
            description="Time in bodies.",
            explicit_bucket_boundaries_advisory=_BUCKETS,
        )
        self._executions = _Executions()

    def on_event(self, event: IdempotencyEvent, /) -> None:
        """Count the event, measure the body, and make the span of a call that ends with it."""
        attributes = _attributes_of(event)
        self._events.add(1, attributes)
        if event.body_seconds is not None:
            self._bodies.record(event.body_seconds, attributes)
        if event.kind in _WITH_SPAN:
            span = self._span_of(event, attributes)
            if event.kind is EventKind.EXECUTED:
                self._executions.remember(event, span.get_span_context())

    def _span_of(self, event: IdempotencyEvent, attributes: dict[str, str]) -> trace.Span:
        """Return the span of a call, from its start until now."""
        ended_at = time.time_ns()
        original = self._executions.find(event)
        span = self._tracer.start_span(
            f"idempotent {_name_of(event)}",
            attributes={**attributes, "aidem.fence": event.fence},
            links=() if original is None else (trace.Link(original),),
            start_time=ended_at - round(event.duration_seconds * 1e9),
        )
        if isinstance(event.error, Exception):  # nothing is wrong with a call that is cancelled
            span.set_status(trace.StatusCode.ERROR)  # without its message, which may show the key or data
            if event.kind in ENDINGS and span.is_recording():
                # Where the body failed. `Span.record_exception` would add the message, which may show data.
                frames = "".join(traceback.format_tb(event.error.__traceback__))
                details = {"exception.type": _type_of(event.error), "exception.stacktrace": frames}
                span.add_event("exception", details, ended_at)
        span.end(ended_at)
        return span


class _Executions:
    """The spans of the latest executions in this process, by key and fence."""

    def __init__(self) -> None:
        self._spans: OrderedDict[tuple[str, int], trace.SpanContext] = OrderedDict()
        self._guard = ForkSafeLock()

    def remember(self, event: IdempotencyEvent, span: trace.SpanContext) -> None:
        """Remember the span of an execution, and forget the oldest beyond `LINKED_EXECUTIONS`."""
        with self._guard.lock:
            self._spans[event.key, event.fence] = span
            if len(self._spans) > LINKED_EXECUTIONS:
                self._spans.popitem(last=False)

    def find(self, event: IdempotencyEvent) -> trace.SpanContext | None:
        """Return the span of the execution whose outcome this is, if it is remembered."""
        with self._guard.lock:
            return self._spans.get((event.key, event.fence))


def _attributes_of(event: IdempotencyEvent) -> dict[str, str]:
    """Return the attributes of counter and span. They have few values, as each combination is a time series."""
    is_function = " " not in event.function
    attributes = {
        "aidem.event": str(event.kind),
        "code.function.name" if is_function else "aidem.operation": _name_of(event),
    }
    if event.error is not None:
        attributes["error.type"] = _type_of(event.error)
    return attributes


def _type_of(error: BaseException) -> str:
    return f"{type(error).__module__}.{type(error).__qualname__}"


def _name_of(event: IdempotencyEvent) -> str:
    return event.function.removeprefix("the ")
