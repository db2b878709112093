"""The MCP tool, as clients call it: again after a time-out, from another session, and after its server was killed."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from mcp import MCPError
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters

from aidem import idempotency_key
from tests.support.recipes import ASYNC_BANK, Bank, Directory, load, until
from tests.support.servers import started

ORDER = {"order_id": "o-1", "cents": 4200}


@pytest.fixture
def bank() -> Bank:
    return Bank()


@pytest.fixture
def program(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> Any:
    return load("mcp_server.py", bank, monkeypatch)


@pytest.fixture
async def client(program: Any) -> AsyncGenerator[Client]:
    async with Client(program.mcp) as client:
        yield client


async def said(client: Client, order: dict[str, Any]) -> tuple[bool, str]:
    """Call the tool; return whether that is an error, and what the model reads."""
    answer: Any = await client.call_tool("charge", order)
    return answer.is_error, answer.content[0].text


async def test_a_model_sees_the_arguments_of_the_function_and_that_it_may_call_again(client: Client) -> None:
    [tool] = (await client.list_tools()).tools
    assert tool.input_schema["required"] == ["order_id", "cents"]
    assert {name: each["type"] for name, each in tool.input_schema["properties"].items()} == {
        "order_id": "string",
        "cents": "integer",
    }
    assert tool.output_schema is not None
    assert tool.description == "Charge an order. It is charged once, however often this is called."
    assert tool.annotations is not None
    assert tool.annotations.idempotent_hint


async def test_a_call_that_is_repeated_by_another_session_is_charged_once(
    client: Client, program: Any, bank: Bank
) -> None:
    assert await said(client, ORDER) == (False, "charged 4200")
    async with Client(program.mcp) as other:
        assert await said(other, ORDER) == (False, "charged 4200")
    assert bank.charges == ["o-1"]


async def test_a_call_goes_on_when_its_client_gives_up_and_the_next_call_gets_its_result(
    client: Client, bank: Bank
) -> None:
    bank.is_open.clear()
    with pytest.raises(MCPError):
        await client.call_tool("charge", ORDER, read_timeout_seconds=2)
    assert bank.charges == ["o-1"]
    again = asyncio.create_task(said(client, ORDER))
    bank.is_open.set()
    assert await again == (False, "charged 4200")
    assert bank.charges == ["o-1"]


async def test_a_call_with_another_amount_is_refused(client: Client, bank: Bank) -> None:
    await said(client, ORDER)
    is_error, text = await said(client, ORDER | {"cents": 1})
    assert is_error
    assert "This was called before with other arguments" in text
    assert bank.charges == ["o-1"]


@pytest.mark.server
async def test_a_call_whose_server_was_killed_is_for_a_person_and_what_was_done_before_is_a_replay(
    tmp_path: Path, program: Any
) -> None:
    with started("valkey", movable_clock=time.time()) as store:
        store.shift_clock(0)
        shop = Directory.of(tmp_path, "mcp_server.py", ASYNC_BANK, AIDEM_PERSISTENCE=store.url)
        server = StdioServerParameters(
            command=sys.executable, args=["mcp_server.py"], env=shop.environment, cwd=shop.path
        )

        async def has_begun() -> bool:
            return len(shop.charges()) == 2

        lost = ORDER | {"order_id": "o-2"}
        async with Client(server) as client:
            assert await said(client, ORDER) == (False, "charged 4200")
            shop.hold()
            call = asyncio.create_task(said(client, lost))
            await until(has_begun)
            os.kill(shop.charges()[0][0], signal.SIGKILL)
            with pytest.raises(MCPError):
                await call
        shop.go_on()
        store.shift_clock(60)  # its lease has passed
        async with Client(server) as client:
            assert await said(client, ORDER) == (False, "charged 4200")
            is_error, text = await said(client, lost)
    assert is_error
    assert "Do not call again" in text
    assert idempotency_key(program.charge, **lost) in text
    assert [order for _, order, _ in shop.charges()] == ["o-1", "o-2"]
