"""The handlers of the documentation that have an effect, proved: the pages say in a sentence what this shows."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiosqlite
import httpx
import pytest

from aidem.testing import CrashReport, FakeClock, crash_everywhere

ROOT = Path(__file__).parents[2]
UNRECORDED = {("vanish", "before complete is applied")}
"""Where an effect without a key happens twice: the process dies before its outcome is recorded (W1)."""


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def blocks_of(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)


def code_of(page: str, blocks: list[str]) -> str:
    """Return blocks of a page, each at the lines that it has there."""
    code = ""
    text = (ROOT / page).read_text("utf-8")
    for block in blocks:
        lines = text[: text.index(block)].count("\n") - code.count("\n")
        code += "\n" * lines + block
    return code


def names_of(page: str, clock: FakeClock, *, blocks: int | None = None) -> dict[str, Any]:
    """Run blocks of a page as far as they define something, with layers that go by the clock."""
    code = code_of(page, blocks_of(page)[:blocks]).replace("PersistenceLayer()", "PersistenceLayer(clock=clock)")
    code = re.sub(r'(SQLitePersistenceLayer\("[\w.]+"[^)]*)\)', r"\1, clock=clock)", code)
    definitions = re.sub(r"^(?:assert |asyncio\.run\().*$", "", code, flags=re.MULTILINE)
    names: dict[str, Any] = {"clock": clock}
    exec(compile(definitions, ROOT / page, "exec", dont_inherit=True), names)
    return names


async def prove(
    call: Callable[[], Awaitable[object]],
    clock: FakeClock,
    effects: list[Any],
    *,
    count: Callable[[], int] | None = None,
) -> CrashReport:
    report = await crash_everywhere(
        call, clock=clock, reset=effects.clear, effects=count or (lambda: len(effects)), timeout_seconds=30
    )
    assert [point for point in report.points if not point.reached or point.effects not in {1, 2}] == []
    return report


def where_twice(report: CrashReport) -> set[tuple[str, str]]:
    return {(point.way, point.when) for point in report.points if point.effects == 2}


def client_of(app: Any) -> httpx.AsyncClient:
    headers = {"Authorization": "Bearer token-of-ann", "Idempotency-Key": '"k-1"'}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="https://shop", headers=headers)


def requesting(app: Any, body: dict[str, Any]) -> Callable[[], Awaitable[object]]:
    async def post() -> None:
        async with client_of(app) as client:
            (await client.post("/payments", json=body)).raise_for_status()

    return post


async def test_the_function_of_the_first_page(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of("docs/index.md", clock)
    async with names["layer"]:
        report = await prove(lambda: names["charge"]("o-1", 4200), clock, names["charges"])
    assert where_twice(report) == UNRECORDED


@pytest.mark.parametrize("name", ["charge", "charge_patiently", "charge_exactly", "pay", "pay_in_steps"])
async def test_the_functions_and_blocks_of_the_tutorial_that_take_money(clock: FakeClock, name: str) -> None:
    names = names_of("docs/tutorial.md", clock)
    report = await prove(lambda: names[name](names["Order"]("o-1", 4200)), clock, names["charges"])
    assert where_twice(report) == UNRECORDED


async def test_the_event_handler_of_the_tutorial(clock: FakeClock) -> None:
    names = names_of("docs/tutorial.md", clock)
    event = {"body": '{"id": "o-1"}'}
    assert where_twice(await prove(lambda: names["handler"](event, None), clock, names["charges"])) == UNRECORDED


async def test_the_function_of_the_tutorial_that_brings_a_key(clock: FakeClock) -> None:
    names = names_of("docs/tutorial.md", clock)
    asked = names["asked"]
    asked_before = ["a key of another call"]

    def count() -> int:
        return len({*asked} - {*asked_before})

    async def charge() -> None:
        if not asked:
            asked.extend(asked_before)  # the first attempt of the example fails
        await names["charge_with_key"]("o-7")

    assert where_twice(await prove(charge, clock, asked, count=count)) == set()


async def test_the_route_of_the_fastapi_page(clock: FakeClock) -> None:
    names = names_of("docs/fastapi.md", clock, blocks=1)
    report = await prove(requesting(names["app"], {"order_id": "o-1", "cents": 4200}), clock, names["charges"])
    assert where_twice(report) == UNRECORDED


async def test_the_app_of_the_http_page_whose_bank_takes_a_key(clock: FakeClock) -> None:
    names = names_of("docs/http.md", clock, blocks=1)
    charges = names["charges"]
    call = requesting(names["app"], {"id": "o-1", "cents": 4200})
    assert where_twice(await prove(call, clock, charges)) == UNRECORDED
    assert where_twice(await prove(call, clock, charges, count=lambda: len({*charges}))) == set()


async def rows_of_the_shop(statement: str) -> list[Any]:
    async with aiosqlite.connect("shop.sqlite3", isolation_level=None) as connection:
        await connection.execute(
            "CREATE TABLE IF NOT EXISTS payments (number INTEGER PRIMARY KEY, order_id TEXT, cents INTEGER)"
        )
        return list(await connection.execute_fetchall(statement))


async def prove_rows(
    names: dict[str, Any], call: Callable[[], Awaitable[object]], clock: FakeClock, **options: Any
) -> CrashReport:
    """Prove a call whose effect is a row, which it inserts in a transaction of its own."""

    async def count() -> int:
        return len(await rows_of_the_shop("SELECT * FROM payments"))

    async with names["layer"]:
        report = await crash_everywhere(
            call,
            clock=clock,
            reset=lambda: rows_of_the_shop("DELETE FROM payments"),
            effects=count,
            timeout_seconds=30,
            **options,
        )
    assert {point.outcome for point in report.points} == {"returned"}
    return report


async def test_the_block_of_the_transactions_page(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of("docs/transactions.md", clock, blocks=1)
    report = await prove_rows(names, lambda: names["pay"]("o-1", 4200), clock)
    report.check()
    assert 'await connection.execute("COMMIT")' in {point.line for point in report.points}


async def test_the_route_of_the_transactions_page(
    clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = names_of("docs/transactions.md", clock, blocks=1)
    [block] = [block for block in blocks_of("docs/transactions.md") if "async def create_payment" in block]
    code = re.sub(r"^asyncio\.run\(.*$", "", code_of("docs/transactions.md", [block]), flags=re.MULTILINE)
    exec(compile(code, ROOT / "docs/transactions.md", "exec", dont_inherit=True), names)
    report = await prove_rows(
        names, requesting(names["app"], {"order_id": "o-1", "cents": 4200}), clock, ways=["vanish"]
    )
    report.check()
    assert "await session.commit()" in {point.line for point in report.points}


async def test_the_batch_of_the_lambda_page(clock: FakeClock) -> None:
    names: dict[str, Any] = {"clock": clock}
    [code] = [code for code in blocks_of("docs/lambda.md") if "async def charge_all" in code]
    exec(code.replace("PersistenceLayer()", "PersistenceLayer(clock=clock)"), names)
    source = {"eventSource": "aws:sqs", "eventSourceARN": "arn:aws:sqs:eu-central-1:111122223333:orders"}
    bodies = ('{"order_id": "o-1", "amount": 1}', '{"order_id": "o-2", "amount": -1}')
    records = [{"messageId": f"m-{number}", "body": body, **source} for number, body in enumerate(bodies)]
    report = await prove(lambda: names["charge_all"].__wrapped__({"Records": records}, None), clock, names["charged"])
    assert {way for way, _ in where_twice(report)} == {"vanish"}


def example(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"proved_{name}", ROOT / "docs" / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_the_payment_handler(clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["payment.py", str(tmp_path)])
    payment = example("payment")
    payment.layer.clock = clock
    bank = tmp_path / "bank.jsonl"
    async with payment.layer:
        report = await crash_everywhere(
            lambda: payment.charge("order-1", 4200),
            clock=clock,
            reset=lambda: bank.write_text(""),
            effects=lambda: len(payment.charges()),
        )
    report.check()


async def test_the_payment_service(clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("AIDEM_PERSISTENCE", raising=False)
    monkeypatch.setenv("BANK_LOG", str(tmp_path / "bank.log"))
    service = example("service")
    service.layer.clock = clock
    bank = tmp_path / "bank.log"
    bank.touch()
    async with service.layer:
        report = await crash_everywhere(
            requesting(service.app, {"order_id": "o-1", "cents": 4200}),
            clock=clock,
            reset=lambda: bank.write_text(""),
            effects=lambda: len({*bank.read_text().splitlines()}),  # the bank knows its references
            timeout_seconds=30,
        )
    report.check()
