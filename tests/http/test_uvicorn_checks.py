"""A worker of uvicorn is killed in a handler: who comes then asks the check, in whichever worker it is served."""

from __future__ import annotations

import asyncio
import os
import signal
import uuid
from collections.abc import Iterator

import httpx
import pytest

from tests.support.served import DEADLINE_SECONDS, Service, is_replay, post, serving
from tests.support.service_data import Arrivals

pytestmark = pytest.mark.server

CALLERS = 5


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("checks")
    with serving(f"sqlite:///{directory / 'records.sqlite3'}", directory, has_check=True) as service:
        yield service


@pytest.fixture
async def name(service: Service) -> str:
    """The name of a request whose worker was killed in the handler."""
    name = f"request-{uuid.uuid4().hex}"
    async with service.client() as client:
        running = asyncio.create_task(post(client, "/charge?seconds=60", name, headers={"x-seconds": "60"}))
        await service.wait_until(name, "start")
        os.kill(service.pid_of(name), signal.SIGKILL)
        with pytest.raises(httpx.TransportError):
            await running
    service.wait_for_workers()
    return name


@pytest.mark.parametrize("verdict", ["happened", "did not happen", "unknown"])
async def test_five_callers_of_two_workers_ask_one_check_and_get_its_verdict(
    service: Service, name: str, verdict: str
) -> None:
    arrivals = Arrivals(str(service.directory / name))
    path = "/charge?seconds=60"
    headers = {"x-verdict": verdict, "x-arrivals": arrivals.path, "x-seconds": "0.1"}

    def workers() -> set[int]:
        return {event["pid"] for event in service.events(name) if event["kind"] == "arrived"}

    async with service.client() as client:
        asking = [asyncio.create_task(post(client, path, name, headers=headers)) for _ in range(CALLERS)]
        await service.wait_until(name, "arrived", times=CALLERS)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len(workers()) < 2:  # one has taken all connections
                asking.append(asyncio.create_task(post(client, path, name, headers=headers)))
                await service.wait_until(name, "arrived", times=len(asking))
        await service.wait_until(name, "asked")
        arrivals.note(0)
        responses = await asyncio.gather(*asking)
    asked = service.kinds(name).count("asked")
    if verdict == "unknown":  # shared by the callers of a worker; the other worker asks for its own
        assert 1 <= asked <= 2
        assert {(each.status_code, each.headers["retry-after"]) for each in responses} == {(409, "10")}
        assert service.kinds(name).count("start") == 1
        return
    assert asked == 1
    assert {each.status_code for each in responses} == {201}
    [effect] = {each.json()["effect"] for each in responses}
    runs = service.effects(name)[1:]  # without that of the worker that was killed
    assert effect == ("found" if verdict == "happened" else runs[0])
    assert len(runs) == (verdict == "did not happen")
    assert sum(not is_replay(each) for each in responses) == len(runs)
