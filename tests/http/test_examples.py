"""The service and the client in docs/examples, run as they are: whatever breaks in between, one charge."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from email.utils import formatdate
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.proxy import Proxy
from tests.support.served import HEALTH_CHECK_SECONDS
from tests.support.servers import RedisServer, free_port, started

pytestmark = pytest.mark.timeout(180)
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
DEADLINE_SECONDS = 60.0  # starting two workers may take long
ANN = {"Authorization": "Bearer token-of-ann"}
BOB = {"Authorization": "Bearer token-of-bob"}
ORDER = {"order_id": "o-1", "cents": 4200}


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


client_example = example("client")


# --- The client -----------------------------------------------------------------------------------------------------


@dataclass
class Script:
    """A server that answers as written, and a clock that remembers how long the client slept."""

    answers: list[httpx.Response | Exception]
    requests: list[httpx.Request] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    def answer(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def post(self, **options: Any) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.MockTransport(self.answer), base_url="http://shop") as client:
            response: httpx.Response = await client_example.post_once(
                client, "/payments", json=ORDER, key="k-1", sleep=self.sleep, **options
            )
            return response


async def test_the_client_repeats_a_request_with_the_same_key_until_it_is_answered() -> None:
    script = Script([httpx.ConnectError("refused"), httpx.ReadError("cut"), httpx.Response(500), httpx.Response(201)])
    assert (await script.post()).status_code == 201
    assert [request.headers["Idempotency-Key"] for request in script.requests] == ['"k-1"'] * 4
    assert len({request.content for request in script.requests}) == 1
    assert all(0 <= pause <= 0.2 * 2**attempt for attempt, pause in enumerate(script.pauses))


@pytest.mark.parametrize("status", [200, 400, 402, 409, 422])
async def test_the_client_takes_an_answer_that_will_not_change(status: int) -> None:
    script = Script([httpx.Response(status)])
    assert (await script.post()).status_code == status
    assert script.pauses == []


@pytest.mark.parametrize("status", [409, 503])
async def test_the_client_waits_as_long_as_it_is_told(status: int) -> None:
    date = formatdate(time.time() + 40, usegmt=True)
    told = [httpx.Response(status, headers={"Retry-After": value}) for value in ("7", date)]
    script = Script([*told, httpx.Response(201)])
    await script.post()
    assert 7 <= script.pauses[0] <= 7.2
    assert 20 <= script.pauses[1] <= 40.4


async def test_the_client_does_not_wait_for_ever() -> None:
    past = formatdate(0, usegmt=True)
    told = [httpx.Response(503, headers={"Retry-After": value}) for value in ("86400", past)]
    script = Script([*told, httpx.Response(201)])
    await script.post()
    assert script.pauses[0] <= 60.2
    assert script.pauses[1] <= 0.4


async def test_the_client_gives_up_with_what_it_got_last() -> None:
    script = Script([httpx.Response(503)] * 2)
    with pytest.raises(httpx.HTTPStatusError):
        await script.post(attempts=2)
    assert len(script.pauses) == 1

    script = Script([httpx.ReadTimeout("slow")] * 2)
    with pytest.raises(httpx.ReadTimeout):
        await script.post(attempts=2)


# --- The page -------------------------------------------------------------------------------------------------------


def test_what_the_page_quotes_is_in_the_examples() -> None:
    quoted = re.findall(r"^```py\n(.*?)^```$", (EXAMPLES.parent / "fastapi.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(quoted) == 4
    examples = [parsed((EXAMPLES / f"{name}.py").read_text()) for name in ("checkout", "service", "client")]
    statements = {ast.unparse(node) for example in examples for node in ast.walk(example) if isinstance(node, ast.stmt)}
    for block in quoted:  # its lines are shorter, and not indented
        assert {ast.unparse(statement) for statement in parsed(block).body} <= statements


def parsed(code: str) -> ast.Module:
    return compile(code, "code", "exec", ast.PyCF_ONLY_AST | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


# --- Both together --------------------------------------------------------------------------------------------------


@dataclass
class Service:
    """The service under uvicorn with two workers."""

    directory: Path
    redis: RedisServer | None
    port: int = field(default_factory=free_port)

    @property
    def charges(self) -> list[str]:
        """Every charge, with customer, sum and order."""
        log = self.directory / "bank.log"
        lines = log.read_text().splitlines() if log.exists() else []
        return [line.partition(" under ")[0] for line in lines]

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        environment = os.environ | ({} if self.redis is None else {"AIDEM_PERSISTENCE": self.redis.url})
        options = [f"--port={self.port}", "--workers=2", f"--timeout-worker-healthcheck={HEALTH_CHECK_SECONDS}"]
        with (self.directory / "output.txt").open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "uvicorn", "service:app", "--app-dir", str(EXAMPLES), *options],
                cwd=self.directory,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            self._wait_until_ready(process)
            yield
            process.terminate()
            process.wait(DEADLINE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (output := (self.directory / "output.txt").read_text()).count("startup complete") < 2:
            assert process.poll() is None, output
            assert time.monotonic() < deadline, output
            time.sleep(0.02)


@pytest.fixture(scope="module", params=["redis", "sqlite"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp(request.param)
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(started("redis")) if request.param == "redis" else None
        service = Service(directory, redis)
        stack.enter_context(service.running())
        yield service


@pytest.fixture
async def proxy(service: Service) -> AsyncGenerator[Proxy]:
    (service.directory / "bank.log").unlink(missing_ok=True)
    async with Proxy.to(service.port) as proxy:
        yield proxy


def through(proxy: Proxy, headers: dict[str, str] = ANN) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=f"http://127.0.0.1:{proxy.port}", headers=headers, timeout=DEADLINE_SECONDS)


async def paid(client: httpx.AsyncClient, key: str, **options: Any) -> httpx.Response:
    response: httpx.Response = await client_example.post_once(client, "/payments", json=ORDER, key=key, **options)
    return response


def repairing(repair: Callable[[], object]) -> Callable[[float], Awaitable[None]]:
    """Return a pause in which something is repaired."""

    async def sleep(seconds: float) -> None:
        repair()
        await asyncio.sleep(0)

    return sleep


@pytest.mark.server
async def test_a_payment_whose_answer_is_lost_is_charged_once(service: Service, proxy: Proxy) -> None:
    proxy.cut_after_reply_is_dropped()
    async with through(proxy) as client:
        response = await paid(client, "lost answer")
    assert proxy.dropped.replies > 0
    assert (response.status_code, response.headers["Idempotent-Replayed"]) == (201, "true")
    assert response.json().items() >= ORDER.items()
    assert service.charges == ["ann paid 4200 for o-1"]


@pytest.mark.server
async def test_a_payment_that_never_arrived_is_sent_again(service: Service, proxy: Proxy) -> None:
    proxy.refuse()
    async with through(proxy) as client:
        response = await paid(client, "never arrived", sleep=repairing(proxy.heal))
    assert proxy.connections > 1
    assert "Idempotent-Replayed" not in response.headers
    assert service.charges == ["ann paid 4200 for o-1"]


@pytest.mark.server
async def test_impatient_clients_are_charged_once(service: Service, proxy: Proxy) -> None:
    async with through(proxy) as client:
        responses = await asyncio.gather(*(paid(client, "impatient") for _ in range(20)))
    assert {response.status_code for response in responses} == {201}
    assert len({response.content for response in responses}) == 1
    assert service.charges == ["ann paid 4200 for o-1"]


@pytest.mark.server
async def test_two_customers_may_choose_the_same_key(service: Service, proxy: Proxy) -> None:
    for headers in (ANN, BOB):
        async with through(proxy, headers) as client:
            assert (await paid(client, "same")).status_code == 201
    assert service.charges == ["ann paid 4200 for o-1", "bob paid 4200 for o-1"]


@pytest.mark.server
async def test_what_is_wrong_with_a_request_is_said_at_once(service: Service, proxy: Proxy) -> None:
    async with through(proxy) as client:
        assert (await client.post("/payments", json=ORDER)).status_code == 400
        assert (await paid(client, "wrong")).status_code == 201
        key = {"Idempotency-Key": '"wrong"'}
        assert (await client.post("/payments", json={**ORDER, "cents": 1}, headers=key)).status_code == 422
    async with through(proxy, {"Authorization": "Bearer made-up"}) as client:
        assert (await paid(client, "wrong")).status_code == 401
    assert service.charges == ["ann paid 4200 for o-1"]


@pytest.mark.server
@pytest.mark.parametrize("service", ["redis"], indirect=True)
async def test_a_store_that_is_down_is_waited_for(service: Service, proxy: Proxy) -> None:
    assert service.redis is not None
    pauses = list[float]()

    async def sleep(seconds: float) -> None:
        assert service.redis is not None
        pauses.append(seconds)
        if len(pauses) == 1:
            await asyncio.to_thread(service.redis.start)
        await asyncio.sleep(0.1)

    service.redis.kill()
    async with through(proxy) as client:
        response = await paid(client, "store down", sleep=sleep)
    assert pauses[0] >= 1.0  # told by Retry-After
    assert response.status_code == 201
    assert service.charges == ["ann paid 4200 for o-1"]


@pytest.mark.server
def test_the_client_runs_as_a_script(service: Service) -> None:
    command = [sys.executable, str(EXAMPLES / "client.py"), f"http://127.0.0.1:{service.port}"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=True).stdout
    first, second = output.splitlines()
    assert first.startswith("201 {'order_id': 'o-1'")
    assert first.endswith(" replayed: false")
    assert second == first.removesuffix("false") + "true"
