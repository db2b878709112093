"""Records in Redis or Valkey: for any number of processes on any number of machines."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import TYPE_CHECKING, Any, Final, TypeVar

from aidem._distribution import how_to_install
from aidem._rules import lifecycle
from aidem._rules.lifecycle import Blocked, Claimed, Completion
from aidem._rules.record import DataRecord, RecordStatus
from aidem._runtime.cancellation import UncancellableFuture
from aidem.exceptions import (
    IdempotencyInvalidStatusError,
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
)
from aidem.persistence._by_loop import ByLoop
from aidem.persistence._context import OpenedByAsyncWith
from aidem.persistence._scan import RECORDS_PER_PAGE, selected

try:
    from aidem.persistence.redis import _checks
    from aidem.persistence.redis._deployment import Mode, deployment_of, is_lock_respected
    from aidem.persistence.redis._wire import Command
except ImportError as error:
    raise ImportError(f"RedisPersistenceLayer needs redis-py and hiredis: {how_to_install('redis')}") from error
from aidem.persistence.redis._records import RecordText, durations
from aidem.persistence.redis._scripts import CHANNEL, AttributeNames, Script, Scripts, Verdict

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from redis.asyncio import Redis, RedisCluster

    from aidem.persistence import Diagnosis

__all__ = ["RedisCachePersistenceLayer", "RedisPersistenceLayer"]

logger = logging.getLogger("aidem")

T = TypeVar("T")

MAX_RECORD_BYTES: Final = 64 * 1024 * 1024


class RedisPersistenceLayer(OpenedByAsyncWith):
    """Keeps records in Redis 6.2 or newer, or in Valkey. docs/redis.md says which settings the server needs.

    Every operation is one script on one key, judged by the server's clock. All operations of an event loop share one
    connection to each server; concurrent operations share its round trips.

    Args:
        url: `redis://`, `rediss://` (TLS) or `unix://`, with the options of redis-py; `redis+cluster://host,host2`;
            `redis+sentinel://host,host2/service/0`. A username and a password in it are percent-encoded. With a URL,
            `host`, `port`, `username`, `password`, `db_index` and `ssl` are ignored.
        host: Name or address of the server.
        port: Port of the server. Default: 6379.
        username: A user of the server's ACL. Default: the default user.
        password: The password of that user. Default: none.
        db_index: Number of the database. Default: 0.
        mode: `"standalone"`, `"cluster"` or `"sentinel"`. Default: as the URL or the client says, else `"standalone"`.
        ssl: Whether to use TLS with `host`; certificates and host names are checked. Default: True.
        client: A `Redis` or `RedisCluster` of `redis.asyncio`, also one from `Sentinel.master_for`, whose settings are
            used. The layer makes connections of its own, and never uses, changes or closes the client. It cannot use a
            client with a connection class other than redis-py's own, or with a `redis_connect_func`.
        shared_with_powertools: Whether to respect the lock that AWS Powertools for Python sets when it takes over a
            record. Default: True, except in a cluster, where it is not possible.
        timeout_seconds: How long connecting may take, and then how long an operation. Default: 5.
        clock: Returns epoch seconds, to judge by instead of the server's clock; for tests. Default: none.
        expiry_attr: Name of the expiry in the JSON text of a record; the other `_attr` options name the other fields.
            All names must differ. Defaults: those of AWS Powertools.

    Raises:
        IdempotencyPersistenceConfigError: An option has a value that cannot work, the options name no server, or the
            client cannot be used.
    """

    # Slots: what is set on a layer by mistake, such as `layer.client = ...`, is refused.
    __slots__ = (
        "__weakref__",
        "_connections",
        "_is_checked",
        "_is_deafness_logged",
        "_mode",
        "_own_clock",
        "_respects_lock",
        "_scripts",
        "_text",
        "clock",
    )

    clock: Callable[[], float]

    def __init__(
        self,
        url: str = "",
        *,
        host: str = "",
        port: int = 6379,
        username: str = "",
        password: str = "",
        db_index: int = 0,
        mode: Mode = "standalone",
        ssl: bool = True,
        client: Redis | RedisCluster | None = None,
        shared_with_powertools: bool | None = None,
        timeout_seconds: float = 5.0,
        clock: Callable[[], float] | None = None,
        expiry_attr: str = "expiration",
        in_progress_expiry_attr: str = "in_progress_expiration",
        status_attr: str = "status",
        data_attr: str = "data",
        validation_key_attr: str = "validation",
        owner_attr: str = "owner",
        fence_attr: str = "fence",
        lease_expiry_attr: str = "lease_expiration",
        outcome_attr: str = "outcome",
        note_attr: str = "note",
    ) -> None:
        deployment = deployment_of(
            client, url=url, host=host, port=port, username=username, password=password, db=db_index, ssl=ssl, mode=mode
        )
        if clock is not None:
            self.clock = clock  # the engine asks for it by this name
        self._own_clock = clock
        self._mode = deployment.mode
        self._respects_lock = is_lock_respected(shared_with_powertools, mode=deployment.mode)
        names = AttributeNames(
            expiry=expiry_attr,
            in_progress_expiry=in_progress_expiry_attr,
            status=status_attr,
            data=data_attr,
            validation_key=validation_key_attr,
            owner=owner_attr,
            fence=fence_attr,
            lease_expiry=lease_expiry_attr,
            outcome=outcome_attr,
            note=note_attr,
        )
        self._is_checked = False
        self._is_deafness_logged = False
        self._text = RecordText(names)
        self._scripts = Scripts(names)
        self._connections = ByLoop(lambda: deployment.connections(timeout_seconds=timeout_seconds))

    # --- Operations -------------------------------------------------------------------------------------------------

    def acquire(
        self,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,  # noqa: ARG002 - the server's clock is the only one
    ) -> UncancellableFuture[Claimed | Blocked]:
        """Store a claim unless a live record of another owner is there."""
        key = record.idempotency_key
        keys = (key, f"{key}:lock") if self._respects_lock else (key,)
        return self._ask(
            (len(keys), *keys, *self._judge(record), *durations(record, now=now), self._text.claim(record)),
            lambda reply: self._claim_answer(key, *reply),
            self._scripts.acquire,
        )

    def take_over(
        self,
        found: DataRecord,
        record: DataRecord,
        *,
        now: float,
        max_clock_skew_seconds: float = 0.0,  # noqa: ARG002 - the server's clock is the only one
        force: bool = False,
    ) -> UncancellableFuture[DataRecord | None]:
        """Store a claim in the place of the one found."""
        key = record.idempotency_key
        keys = (key, f"{key}:lock") if self._respects_lock else (key,)
        claim = (*durations(record, now=now, to_nearest_second=True), self._text.claim(record))
        return self._ask(
            (len(keys), *keys, *self._judge(record), *claim, found.owner or "", found.fence, int(force)),
            lambda reply: self._text.read(key, reply),
            self._scripts.take_over,
        )

    def complete(self, record: DataRecord, *, now: float) -> UncancellableFuture[bool]:
        """Store an outcome over the claim of the same owner, or where no record is.

        Raises:
            IdempotencySerializationError: It is too large.
        """
        text = self._text.outcome(record)
        if len(text) > MAX_RECORD_BYTES:
            raise IdempotencySerializationError(
                f"a record of {len(text)} bytes is more than the {MAX_RECORD_BYTES} that aidem keeps in Redis",
                key=record.idempotency_key,
            )

        def is_stored(reply: tuple[int, int, bytes]) -> bool:
            verdict, judged_at, found = reply
            if verdict == Verdict.STORED:
                return True
            known = self._text.read(record.idempotency_key, found)
            return lifecycle.complete(known, record, now=judged_at / 1000) is Completion.ALREADY_STORED

        kept, _, _ = durations(record, now=now)
        return self._ask(
            (1, record.idempotency_key, *self._judge(record), kept, text), is_stored, self._scripts.complete
        )

    def renew(self, record: DataRecord, *, now: float) -> UncancellableFuture[DataRecord | None]:
        """Set the instants of a claim of the same owner."""
        key = record.idempotency_key
        return self._ask(
            (1, key, *self._judge(record), *durations(record, now=now)),
            lambda reply: self._text.read(key, reply),
            self._scripts.renew,
        )

    def release(self, record: DataRecord) -> UncancellableFuture[bool]:
        """Delete a claim of the same owner."""
        return self._ask((1, record.idempotency_key, *self._judge(record)), bool, self._scripts.release)

    def get(self, key: str) -> UncancellableFuture[DataRecord | None]:
        """Return the record of a key as it is stored."""
        return self._ask(("GET", key), lambda reply: self._text.read(key, reply))

    async def forget(self, key: str) -> None:
        """Delete any record of the key."""
        await self._ask(("DEL", key), lambda _reply: None)

    def scan(
        self, *, prefix: str = "", status: RecordStatus | None = None, limit: int | None = None
    ) -> AsyncGenerator[DataRecord]:
        """Iterate over the records on all primaries.

        Raises:
            IdempotencyPersistenceConfigError: The ACL of the server forbids SCAN.
        """
        return selected(self._pages(prefix), status=status, limit=limit)

    async def wait_for_change(self, key: str, timeout_seconds: float) -> None:
        """Return when the record has been completed or released, or after the timeout.

        Raises:
            IdempotencyPersistenceLayerError: The server cannot be reached, or its ACL forbids to listen.
        """
        try:
            await self._connections.here().listener.wait(f"{CHANNEL}{key}", timeout_seconds=timeout_seconds)
        except IdempotencyPersistenceConfigError as error:
            if not self._is_deafness_logged:
                self._is_deafness_logged = True
                logger.warning("Redis: waiting callers are not woken, and poll instead: %s", error)
            raise

    # --- Life -------------------------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Connect and check the settings of the server; those that endanger records are logged, once.

        Raises:
            IdempotencyPersistenceLayerError: The server cannot be reached or used.
        """
        problems = await _checks.problems(await self._connections.here().line.nodes(), mode=self._mode)
        if not self._is_checked:
            self._is_checked = True
            for problem in problems:
                logger.warning("Redis: %s", problem)

    async def diagnose(self) -> Diagnosis:
        """Look at the settings of every primary, as far as the ACL shows them.

        Raises:
            IdempotencyPersistenceLayerError: A server cannot be reached or used.
        """
        return await _checks.diagnosis(await self._connections.here().line.nodes(), mode=self._mode)

    async def aclose(self) -> None:
        """Wait for the operations of this event loop that have begun, then close its connections."""
        await self._connections.aclose()

    # --- Inside -----------------------------------------------------------------------------------------------------

    def _judge(self, record: DataRecord) -> tuple[str | int, str]:
        """Return the first arguments of every script: the time to judge by (empty: the server's) and the owner."""
        now = "" if self._own_clock is None else lifecycle.milliseconds(self._own_clock())
        return now, record.owner or ""

    async def _pages(self, prefix: str) -> AsyncGenerator[list[DataRecord]]:
        pattern = re.sub(r"([*?\[\]\\])", r"\\\1", prefix) + "*"
        options = ("MATCH", pattern, "COUNT", str(RECORDS_PER_PAGE), "TYPE", "string")
        seen = set[str]()  # SCAN answers some keys twice, and a slot may move to a node that is asked later
        for node in await self._connections.here().line.nodes():
            cursor = ""
            while cursor != "0":
                reply = await node.query("SCAN", cursor or "0", *options)
                cursor = reply[0].decode()
                names = {name.decode(errors="replace") for name in reply[1]}
                keys = [name for name in names if "#" in name and name not in seen]
                seen.update(keys)
                answers = await asyncio.gather(*map(self.get, keys), return_exceptions=True)
                yield [answer for answer in map(_readable, answers) if answer is not None]

    def _ask(
        self, arguments: tuple[Any, ...], read: Callable[[Any], T], script: Script | None = None
    ) -> UncancellableFuture[T]:
        future: UncancellableFuture[T] = UncancellableFuture(loop=asyncio.get_running_loop())
        self._connections.here().line.ask(Command(future, arguments, read, script))
        return future

    def _claim_answer(self, key: str, verdict: int, now: int, stored: Any) -> Claimed | Blocked:
        if verdict == Verdict.LOCKED:
            # Powertools has locked the record, to overwrite it: it is somebody's claim.
            locked = DataRecord(
                idempotency_key=key, status=RecordStatus.INPROGRESS, in_progress_expiry_timestamp=now + stored
            )
            return Blocked(locked, now / 1000)
        record = self._text.read(key, stored)
        if record is None:
            raise IdempotencyPersistenceLayerError(
                "the stored text is a record to Redis but not to JSON; see forget(key)"
            )
        if verdict == Verdict.REFUSED:
            return Blocked(record, now / 1000)
        if verdict == Verdict.ORPHAN:
            logger.warning(
                "Redis: a text that is no record stood under %s, and gave way to a claim; see who writes it", key
            )
        return Claimed(record, taken_over=verdict in {Verdict.TAKEN_OVER, Verdict.ORPHAN})


RedisCachePersistenceLayer = RedisPersistenceLayer


def _readable(answer: DataRecord | BaseException | None) -> DataRecord | None:
    """Return a record that was found; None: there is none that can be read."""
    if isinstance(answer, BaseException):
        if isinstance(answer, IdempotencyInvalidStatusError):
            return None
        raise answer
    return answer
