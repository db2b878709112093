"""`aidem.prometheus`: what a server of Prometheus scrapes of calls."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, HTTPException
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, make_asgi_app
from prometheus_client.parser import text_string_to_metric_families

from aidem import IdempotencyConfig, idempotent_function
from aidem.asgi import IdempotencyMiddleware
from aidem.exceptions import IdempotencyInDoubtError
from aidem.hooks import ENDINGS, EventKind, IdempotencyEvent, IdempotencyHook
from aidem.persistence.memory import MemoryPersistenceLayer
from aidem.prometheus import MAX_FUNCTIONS, PrometheusHook

ROOT = Path(__file__).parents[1]
PATIENCE_SECONDS = 20.0

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def samples_in(text: str) -> Samples:
    """Return the samples of aidem in an exposition, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name.startswith("aidem_") and not sample.name.endswith("_created")
    }


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((name, frozenset(labels.items())), 0.0)


def samples_of(registry: CollectorRegistry) -> Samples:
    return samples_in(generate_latest(registry).decode())


def event_of(kind: EventKind, **facts: Any) -> IdempotencyEvent:
    defaults: dict[str, Any] = {"key": "key", "function": "shop.charge", "fence": 1, "duration_seconds": 0.0}
    if kind in ENDINGS:
        defaults["body_seconds"] = 0.2
    return IdempotencyEvent(kind=kind, **defaults | facts)


# --- Scraped over HTTP ------------------------------------------------------------------------------------------------


class Shop:
    """A FastAPI app with the middleware, whose metrics are in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.has_begun = threading.Event()
        self.may_end = threading.Event()
        self.app = FastAPI()
        self.app.mount("/metrics", make_asgi_app(registry=self.registry))
        self.app.add_middleware(
            IdempotencyMiddleware,
            persistence_store=MemoryPersistenceLayer(),
            key_prefix="shop",
            scope=None,
            config=IdempotencyConfig(hooks=(PrometheusHook(registry=self.registry),)),
        )

        @self.app.post("/charges/{name}")
        async def charge(name: str) -> dict[str, str]:
            if name == "failing":
                raise HTTPException(503)
            if name == "long":
                self.has_begun.set()
                await asyncio.to_thread(self.may_end.wait, PATIENCE_SECONDS)
            return {"charged": name}


@pytest.fixture(scope="module")
def shop() -> Iterator[tuple[Shop, str]]:
    shop = Shop()
    with socket.create_server(("127.0.0.1", 0)) as listening:  # who connects before the server is there waits for it
        server = uvicorn.Server(uvicorn.Config(shop.app, log_level="warning", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        yield shop, f"http://127.0.0.1:{listening.getsockname()[1]}"
        server.should_exit = True
        thread.join(PATIENCE_SECONDS)
    assert not thread.is_alive()


async def test_a_scrape_has_events_times_in_bodies_and_the_claims_held_now(shop: tuple[Shop, str]) -> None:
    app, url = shop
    of_layer = {"function": "HTTP layer 'shop'"}

    async with httpx.AsyncClient(base_url=url, timeout=PATIENCE_SECONDS) as client:

        async def post(name: str) -> httpx.Response:
            return await client.post(f"/charges/{name}", headers={"idempotency-key": f'"{name}"'})

        async def scrape() -> Samples:
            response = await client.get("/metrics/")
            return samples_in(response.raise_for_status().text)

        assert [(await post("one")).status_code for _ in range(2)] == [200, 200]
        assert (await post("failing")).status_code == 503
        long = asyncio.create_task(post("long"))
        await asyncio.to_thread(app.has_begun.wait, PATIENCE_SECONDS)
        assert (await post("long")).status_code == 409
        meanwhile = await scrape()
        app.may_end.set()
        assert (await long).status_code == 200
        afterwards = await scrape()

    assert value(meanwhile, "aidem_claims_held", **of_layer) == 1
    assert value(afterwards, "aidem_claims_held", **of_layer) == 0
    assert value(meanwhile, "aidem_body_duration_seconds_count", **of_layer) == 2
    assert value(afterwards, "aidem_body_duration_seconds_count", **of_layer) == 3
    counted = {
        (labels["event"], labels["error"]): count
        for (name, pairs), count in afterwards.items()
        if count and name == "aidem_events_total" and (labels := dict(pairs))["function"] == of_layer["function"]
    }
    assert counted == {
        ("claimed", ""): 3,
        ("executed", ""): 2,
        ("replayed", ""): 1,
        ("released", ""): 1,
        ("conflict", "IdempotencyAlreadyInProgressError"): 1,
    }


# --- Without HTTP -----------------------------------------------------------------------------------------------------


async def test_two_hooks_on_one_registry_share_their_metrics() -> None:
    registry, layer = CollectorRegistry(), MemoryPersistenceLayer()

    for _ in range(2):
        config = IdempotencyConfig(hooks=(PrometheusHook(registry=registry),))

        @idempotent_function(persistence_store=layer, config=config, key_prefix="charge")
        async def charge(order: str) -> None: ...

        await charge("o-1")
    of_charge = {"function": f"{__name__}.{charge.__qualname__}", "error": ""}
    counts = [value(samples_of(registry), "aidem_events_total", event=kind, **of_charge) for kind in EventKind]
    assert dict(zip(EventKind, counts, strict=True)) == dict.fromkeys(EventKind, 0.0) | {
        EventKind.CLAIMED: 1,
        EventKind.EXECUTED: 1,
        EventKind.REPLAYED: 1,
    }


def test_the_global_registry_is_the_default() -> None:
    PrometheusHook().on_event(event_of(EventKind.BYPASSED, function="only.here"))
    of_event = {"event": "bypassed", "function": "only.here", "error": ""}
    assert value(samples_of(REGISTRY), "aidem_events_total", **of_event) == 1


def test_a_registry_that_nobody_has_any_more_is_collected() -> None:
    registry = CollectorRegistry()
    hook = PrometheusHook(registry=registry)
    reference = weakref.ref(registry)
    del registry, hook
    gc.collect()
    assert reference() is None


@pytest.mark.parametrize("kind", EventKind)
def test_every_event_is_counted_and_only_endings_are_measured(kind: EventKind) -> None:
    registry = CollectorRegistry()
    PrometheusHook(registry=registry).on_event(event_of(kind))
    samples = samples_of(registry)
    assert value(samples, "aidem_events_total", event=kind.value, function="shop.charge", error="") == 1
    held = {EventKind.CLAIMED: 1.0} | dict.fromkeys(ENDINGS, -1.0)
    assert value(samples, "aidem_claims_held", function="shop.charge") == held.get(kind, 0.0)
    assert value(samples, "aidem_body_duration_seconds_sum", function="shop.charge") == 0.2 * (kind in ENDINGS)


@pytest.mark.parametrize(
    ("error", "label"),
    [
        (IdempotencyInDoubtError("in doubt"), "IdempotencyInDoubtError"),
        (ValueError("of a check"), ""),
        (type("Own", (IdempotencyInDoubtError,), {})("of the user"), ""),
        (None, ""),
    ],
)
def test_only_errors_of_aidem_have_labels_of_their_own(error: Exception | None, label: str) -> None:
    registry = CollectorRegistry()
    PrometheusHook(registry=registry).on_event(event_of(EventKind.CONFLICT, error=error))
    of_event = {"event": "conflict", "function": "shop.charge", "error": label}
    assert value(samples_of(registry), "aidem_events_total", **of_event) == 1


def test_an_ending_has_one_time_series_whatever_the_body_raised() -> None:
    registry = CollectorRegistry()
    for error in (None, ValueError("of the body"), IdempotencyInDoubtError("of a call in the body")):
        PrometheusHook(registry=registry).on_event(event_of(EventKind.RELEASED, error=error))
    of_event = {"event": "released", "function": "shop.charge", "error": ""}
    assert value(samples_of(registry), "aidem_events_total", **of_event) == 3


def test_what_alarms_ask_for_is_zero_before_it_happens() -> None:
    registry = CollectorRegistry()
    PrometheusHook(registry=registry).on_event(event_of(EventKind.CLAIMED))
    counters = {
        (labels["event"], labels["error"]): count
        for (name, pairs), count in samples_of(registry).items()
        if name == "aidem_events_total" and (labels := dict(pairs))
    }
    refusals = ("AlreadyInProgress", "InDoubt", "Validation")
    expected = {(kind.value, ""): 0.0 for kind in EventKind}
    expected |= {("conflict", f"Idempotency{refusal}Error"): 0.0 for refusal in refusals}
    assert counters == expected | {("claimed", ""): 1.0}


def test_prefixes_made_from_data_do_not_make_time_series_without_end() -> None:
    registry = CollectorRegistry()
    hook = PrometheusHook(registry=registry)
    for number in range(MAX_FUNCTIONS + 7):
        hook.on_event(event_of(EventKind.REPLAYED, function=f"the block 'user-{number}'"))
    hook.on_event(event_of(EventKind.REPLAYED, function="the block 'user-0'"))
    samples = samples_of(registry)
    functions = {dict(labels).get("function") for _, labels in samples}
    assert len(functions) == MAX_FUNCTIONS + 1
    assert value(samples, "aidem_events_total", event="replayed", function="other", error="") == 7
    assert value(samples, "aidem_events_total", event="replayed", function="block 'user-0'", error="") == 2


async def test_neither_key_nor_payload_nor_result_is_a_label() -> None:
    registry, layer = CollectorRegistry(), MemoryPersistenceLayer()

    @idempotent_function(
        persistence_store=layer, config=IdempotencyConfig(hooks=(PrometheusHook(registry=registry),)), key_prefix="p"
    )
    async def charge(card: str) -> str:
        return "Ada Lovelace"

    for _ in range(2):
        await charge("4242 4242 4242 4242")
    [key] = layer.records()
    told = generate_latest(registry).decode()
    assert "executed" in told
    for secret in ("4242", "Ada", key.partition("#")[2]):
        assert secret not in told


WORKER = """
import sys
from prometheus_client import CollectorRegistry, generate_latest, multiprocess
from aidem.hooks import EventKind, IdempotencyEvent
from aidem.prometheus import PrometheusHook

hook = PrometheusHook()
for kind, seconds in ((EventKind.CLAIMED, None), (EventKind.CLAIMED, None), (EventKind.EXECUTED, 0.2)):
    hook.on_event(IdempotencyEvent(
        kind=kind, key="key", function="shop.charge", fence=1, duration_seconds=1, body_seconds=seconds
    ))
print("ready", flush=True)
sys.stdin.readline()
registry = CollectorRegistry()
multiprocess.MultiProcessCollector(registry)
print(generate_latest(registry).decode(), end="")
"""


def test_a_scrape_of_one_of_several_processes_has_the_sum_of_all(tmp_path: Path) -> None:
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER],
            cwd=ROOT,
            env=os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    scraped, _ = workers[0].communicate("\n", timeout=PATIENCE_SECONDS)
    workers[1].communicate("\n", timeout=PATIENCE_SECONDS)
    samples = samples_in(scraped)
    assert value(samples, "aidem_events_total", event="claimed", function="shop.charge", error="") == 4
    assert value(samples, "aidem_body_duration_seconds_count", function="shop.charge") == 2
    assert value(samples, "aidem_claims_held", function="shop.charge") == 2


def test_it_is_a_hook() -> None:
    assert isinstance(PrometheusHook(registry=CollectorRegistry()), IdempotencyHook)


def test_what_is_missing_is_said_in_one_sentence() -> None:
    code = "import sys; sys.modules['prometheus_client'] = None; import aidem.prometheus"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=50)
    last_line = run.stderr.splitlines()[-1]
    assert last_line.startswith(
        "ImportError: aidem.prometheus needs the client library of Prometheus: install aidem-idempotency[prometheus],"
    )
