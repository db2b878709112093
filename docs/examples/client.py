"""A client that repeats a payment, with the same key, until it knows what became of it: `python client.py [URL]`."""

import asyncio
import random
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

TEMPORARY = frozenset({408, 425, 429, 500, 502, 503, 504})
LONGEST_PAUSE_SECONDS = 60.0


async def post_once(
    client: httpx.AsyncClient,
    url: str,
    *,
    json: Any,
    key: str,
    attempts: int = 8,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> httpx.Response:
    """Send a request under a key until there is an answer that will not change.

    Args:
        client: Sends it.
        url: Where to.
        json: The body; it must be the same on every attempt.
        key: Make it once for each payment, and keep it with the order: it outlives a crash of this client.
        attempts: How often to try.
        sleep: Waits so many seconds.

    Raises:
        httpx.TransportError: The last attempt got no answer; the payment may have happened.
        httpx.HTTPStatusError: The last attempt was told to try again later.
    """
    for attempt in range(attempts):
        is_last = attempt == attempts - 1
        pause = random.uniform(0, min(0.2 * 2**attempt, LONGEST_PAUSE_SECONDS))  # so that clients do not come in step
        try:
            response = await client.post(
                url,
                json=json,
                headers={"Idempotency-Key": f'"{key}"'},
            )
        except httpx.TransportError:
            # whether it was done is not known: that is what the key is for
            if is_last:
                raise
        else:
            told = retry_after_seconds(response)
            if told is None and response.status_code not in TEMPORARY:
                return response
            if is_last:
                response.raise_for_status()
            pause += min(told or 0.0, LONGEST_PAUSE_SECONDS)
        await sleep(pause)
    raise ValueError("attempts must be at least 1")


def retry_after_seconds(response: httpx.Response) -> float | None:
    """Return what `Retry-After` says, in seconds or as a date; None: nothing."""
    value = response.headers.get("Retry-After")
    if value is None:
        return None
    if value.isdigit():
        return float(value)
    return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())


async def main(url: str) -> None:
    headers = {"Authorization": "Bearer token-of-ann"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as client:
        order, key = {"order_id": "o-1", "cents": 4200}, str(uuid.uuid4())
        for _ in range(2):  # as an impatient user would
            response = await post_once(client, "/payments", json=order, key=key)
            replayed = response.headers.get("Idempotent-Replayed", "false")
            print(response.status_code, response.json(), f"replayed: {replayed}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"))
