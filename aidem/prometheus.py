"""A hook for Prometheus: a counter of events, a histogram of the time in bodies, and a gauge of the claims held now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

from aidem._distribution import how_to_install

try:
    from prometheus_client import REGISTRY, Counter, Gauge, Histogram
except ModuleNotFoundError as missing:
    message = f"aidem.prometheus needs the client library of Prometheus: {how_to_install('prometheus')}"
    raise ImportError(message) from missing

from aidem._runtime.fork import ForkSafeLock
from aidem.exceptions import IdempotencyAlreadyInProgressError, IdempotencyInDoubtError, IdempotencyValidationError
from aidem.hooks import EventKind

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

    from aidem.hooks import IdempotencyEvent

__all__ = ["PrometheusHook"]

MAX_FUNCTIONS: Final = 200
"""The number of functions and key prefixes that have time series of their own; the others share those of `other`."""

_CONFLICTS: Final = tuple(
    kind.__name__ for kind in (IdempotencyAlreadyInProgressError, IdempotencyInDoubtError, IdempotencyValidationError)
)

_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class PrometheusHook:
    """Counts every event, and measures bodies and the claims that are held.

    Hooks on one registry share their metrics, so each config can have one of its own. No label contains a key, a
    payload or a result.

    - `aidem_events_total`, a counter with the labels `event`, `function` and `error`: the class of aidem's error, `""`
      without one. Exceptions of bodies and checks are not told apart.
    - `aidem_body_duration_seconds`, a histogram with the label `function`.
    - `aidem_claims_held`, a gauge with the label `function`: calls whose body runs now.

    Args:
        registry: Where the metrics are registered. Default: the global registry of `prometheus_client`.
    """

    def __init__(self, *, registry: CollectorRegistry = REGISTRY) -> None:
        with _registering.lock:
            metrics = _by_registry.get(registry)
            if metrics is None:
                metrics = _by_registry[registry] = _Metrics(registry)
        self._metrics = metrics

    def on_event(self, event: IdempotencyEvent, /) -> None:
        """Count the event."""
        metrics = self._metrics
        function = metrics.label_of(event.function)
        error = type(event.error)
        is_ours = event.body_seconds is None and error.__module__ == "aidem.exceptions"
        metrics.events.labels(event.kind.value, function, error.__name__ if is_ours else "").inc()
        if event.kind is EventKind.CLAIMED:
            metrics.claims.labels(function).inc()
        elif event.body_seconds is not None:  # an ending
            metrics.claims.labels(function).dec()
            metrics.bodies.labels(function).observe(event.body_seconds)


class _Metrics:
    """The metrics of one registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        # Registered below: a metric that is told of its registry keeps it, and so would the dictionary of registries.
        self.events = Counter(
            "aidem_events", "What happened to idempotent calls.", ("event", "function", "error"), registry=None
        )
        self.bodies = Histogram(
            "aidem_body_duration_seconds", "Time in bodies.", ("function",), buckets=_BUCKETS, registry=None
        )
        self.claims = Gauge(
            "aidem_claims_held", "Calls whose body runs.", ("function",), multiprocess_mode="livesum", registry=None
        )
        for metric in (self.events, self.bodies, self.claims):
            registry.register(metric)
        self._functions: set[str] = set()

    def label_of(self, function: str) -> str:
        """Return the label of a function. There are only so many, as each is a time series for as long as it runs."""
        name = function.removeprefix("the ")
        if name in self._functions:
            return name
        if len(self._functions) >= MAX_FUNCTIONS:
            return "other"
        self._functions.add(name)
        # The time series begin before their first event, or a server sees no increase when it comes.
        for kind in EventKind:
            self.events.labels(kind.value, name, "")
        for error in _CONFLICTS:
            self.events.labels(EventKind.CONFLICT.value, name, error)
        return name


_by_registry: Final[WeakKeyDictionary[CollectorRegistry, _Metrics]] = WeakKeyDictionary()
_registering: Final = ForkSafeLock()
