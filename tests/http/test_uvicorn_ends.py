"""The store goes while requests run; the server leaves while requests run."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.served import Service, is_replay, post, serving
from tests.support.servers import RedisServer, started

pytestmark = pytest.mark.server


@pytest.fixture
def name() -> str:
    return f"request-{uuid.uuid4().hex}"


# --- The store is killed ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis() -> Iterator[RedisServer]:
    with started("redis", "--appendonly", "yes", "--appendfsync", "always") as server:
        yield server


@pytest.fixture(scope="module")
def service(redis: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with serving(redis.url, tmp_path_factory.mktemp("killed")) as service:
        yield service


async def test_a_store_that_is_killed_in_the_middle_and_comes_back_has_the_response(
    redis: RedisServer, service: Service, name: str
) -> None:
    async with service.client() as client:
        running = asyncio.create_task(post(client, "/charge?seconds=2", name))
        await service.wait_until(name, "start")
        redis.kill()
        try:
            await service.wait_until(name, "end")
            assert not running.done()  # it waits for its response to be recorded
        finally:
            redis.start()
        first = await running
        again = await post(client, "/charge?seconds=2", name)
    assert first.status_code == 201
    assert is_replay(again)
    assert again.content == first.content
    assert len(service.effects(name)) == 1


async def test_while_the_store_is_away_requests_with_a_key_are_503_and_others_run(
    redis: RedisServer, service: Service, name: str
) -> None:
    async with service.client() as client:
        running = asyncio.create_task(post(client, "/charge?seconds=2", name))
        await service.wait_until(name, "start")
        redis.kill()
        try:
            refused = await post(client, "/charge", f"{name}-new")
            passing = await client.post("/charge", headers={"x-name": f"{name}-unkeyed"})
            done = await running
        finally:
            redis.start()
        again = await post(client, "/charge?seconds=2", name)
    assert [response.status_code for response in (refused, passing, done, again)] == [503, 201, 503, 201]
    assert refused.json()["title"] == "Idempotency cannot be guaranteed at the moment"
    assert done.json()["title"] == "The request was processed, but this could not be recorded"
    assert "retry-after" in refused.headers
    assert "retry-after" not in done.headers
    assert service.effects(f"{name}-new") == []
    assert service.kinds(name) == ["start", "end"] * 2  # the lease of the first has passed: window W4


# --- The server leaves ------------------------------------------------------------------------------------------------


async def test_a_server_that_leaves_finishes_and_records_what_runs(tmp_path: Path, name: str) -> None:
    store = f"sqlite:///{tmp_path / 'records.sqlite3'}"
    with serving(store, tmp_path / "one") as service:
        async with service.client() as client:
            running = asyncio.create_task(post(client, "/charge?seconds=1", name))
            await service.wait_until(name, "start")
            assert service.process is not None
            os.kill(service.process.pid, signal.SIGTERM)
            first = await running
        assert await asyncio.to_thread(service.stop) == 0
        assert service.output == ""
        assert [event["kind"] for event in service.events("")].count("left") == 2
    with serving(store, tmp_path / "two") as service:
        async with service.client() as client:
            again = await post(client, "/charge?seconds=1", name)
        assert service.effects(name) == []
    assert first.status_code == 201
    assert is_replay(again)
    assert again.content == first.content


async def test_what_a_server_cancels_when_it_leaves_is_given_back(tmp_path: Path, name: str) -> None:
    store, patient = f"sqlite:///{tmp_path / 'records.sqlite3'}", {"lease_seconds": 3600.0}
    with serving(store, tmp_path / "one", "--timeout-graceful-shutdown", "1", **patient) as service:
        async with service.client() as client:
            running = asyncio.create_task(post(client, "/charge", name, headers={"x-seconds": "3600"}))
            await service.wait_until(name, "start")
            assert service.process is not None
            os.kill(service.process.pid, signal.SIGTERM)
            with pytest.raises(httpx.HTTPError):
                (await running).raise_for_status()
        await asyncio.to_thread(service.stop)
        assert service.kinds(name) == ["start"]
    with serving(store, tmp_path / "two", **patient) as service:
        async with service.client() as client:
            again = await post(client, "/charge", name)
        assert service.kinds(name) == ["start", "end"]  # at once, long before the lease has passed
    assert again.status_code == 201
