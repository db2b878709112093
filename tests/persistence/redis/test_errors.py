from __future__ import annotations

import asyncio
import gc
import logging
import ssl
import subprocess
import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff

from aidem import IdempotencyConfig, idempotent_function
from aidem.exceptions import (
    IdempotencyPersistenceConfigError,
    IdempotencyPersistenceConnectionError,
    IdempotencyPersistenceLayerError,
)
from aidem.persistence.redis import RedisPersistenceLayer
from aidem.persistence.redis._errors import ReplyError, connecting_failed
from tests.support.listening import listening
from tests.support.proxy import Proxy
from tests.support.redis import (
    FakeServer,
    acquired,
    claimed,
    client_of,
    completed,
    fake_server,
    stored,
    until,
)
from tests.support.redis_clusters import told
from tests.support.servers import RedisServer, free_port, started

pytestmark = pytest.mark.server

PASSWORD = "secret-word"


# --- What a server answers ------------------------------------------------------------------------------------------

ERRORS = {
    "LOADING Redis is loading the dataset in memory": IdempotencyPersistenceConnectionError,
    "OOM command not allowed when used memory > 'maxmemory'.": IdempotencyPersistenceConnectionError,
    "READONLY You can't write against a read only replica.": IdempotencyPersistenceConnectionError,
    "MASTERDOWN Link with MASTER is down": IdempotencyPersistenceConnectionError,
    "CLUSTERDOWN Hash slot not served": IdempotencyPersistenceConnectionError,
    "TRYAGAIN Multiple keys request during rehashing of slot": IdempotencyPersistenceConnectionError,
    "MOVED 3999 127.0.0.1:6381": IdempotencyPersistenceConnectionError,
    "ASK 3999 127.0.0.1:6381": IdempotencyPersistenceConnectionError,
    "BUSY Redis is busy running a script.": IdempotencyPersistenceConnectionError,
    "MISCONF Errors writing to the AOF file": IdempotencyPersistenceConnectionError,
    "NOREPLICAS Not enough good replicas to write.": IdempotencyPersistenceConnectionError,
    "NOAUTH Authentication required.": IdempotencyPersistenceConfigError,
    "WRONGPASS invalid username-password pair": IdempotencyPersistenceConfigError,
    "NOPERM this user has no permissions": IdempotencyPersistenceConfigError,
    "WRONGTYPE Operation against a key": IdempotencyPersistenceConfigError,
    "ERR unknown command 'EVALSHA', with args beginning with: 'the payload'": IdempotencyPersistenceLayerError,
}


@pytest.fixture
async def fake() -> AsyncGenerator[FakeServer]:
    async with fake_server(lambda _command: b"$-1\r\n") as fake:
        yield fake


@pytest.fixture
async def layer(fake: FakeServer) -> AsyncGenerator[RedisPersistenceLayer]:
    layer = RedisPersistenceLayer(fake.url)
    yield layer
    await layer.aclose()


@pytest.mark.parametrize(("reply", "kind"), ERRORS.items(), ids=[reply.split()[0] for reply in ERRORS])
async def test_an_error_of_the_server_is_one_clear_sentence(
    fake: FakeServer, layer: RedisPersistenceLayer, reply: str, kind: type[Exception]
) -> None:
    fake.answer = lambda _command: f"-{reply}\r\n".encode()
    with pytest.raises(IdempotencyPersistenceLayerError) as failed:
        await layer.get("key")
    assert type(failed.value) is kind
    assert str(failed.value).startswith(f"Redis answered {reply.split(maxsplit=1)[0]}: ")
    assert "payload" not in f"{failed.value!r} {failed.value.__cause__!r}"
    assert failed.value.may_be_applied is (kind is IdempotencyPersistenceLayerError)  # else it was refused


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        ("OOM command not allowed when used memory > 'maxmemory'. script: 1234, on @user_script:5.", "OOM"),
        ("ERR Error running script (call to f_1): @user_script:5: @user_script: 5: -OOM command not allowed", "OOM"),
        ("ERR Error running script (call to f_1): @user_script:5: OOM command not allowed when used memory", "OOM"),
        (
            "ERR Error running script (call to f_1): @user_script:5: @user_script: 5: -MISCONF Redis saves RDB files",
            "MISCONF",
        ),
        ("ERR Error running script (call to f_1): @user_script:5: Script attempted to access the AOF", "ERR"),
    ],
)
def test_an_error_within_a_script_is_found_as_old_and_new_servers_say_it(reply: str, code: str) -> None:
    assert ReplyError(reply).code == code


# --- What a server says of itself -----------------------------------------------------------------------------------


def about(**settings: str) -> Any:
    """Return what a server answers that says this in INFO; `save` is what CONFIG GET answers."""
    save = settings.pop("save", "")

    def answer(command: list[bytes]) -> bytes:
        if command[0] == b"CONFIG":
            return f"*2\r\n$4\r\nsave\r\n${len(save)}\r\n{save}\r\n".encode()
        info = "# Server\r\n" + "".join(f"{name}:{value}\r\n" for name, value in settings.items())
        return f"${len(info)}\r\n{info}\r\n".encode()

    return answer


@pytest.mark.parametrize("version", ["2.8.24", "5.0.14", "6.0.20", "6.1.999"])
async def test_a_server_that_is_too_old_is_refused_when_the_layer_is_opened(
    fake: FakeServer, layer: RedisPersistenceLayer, version: str
) -> None:
    fake.answer = about(redis_version=version)
    with pytest.raises(IdempotencyPersistenceConfigError, match=rf"Redis {version}; aidem needs 6\.2"):
        await layer.open()


@pytest.mark.parametrize("version", ["6.2.0", "7.2.4", "10.0.0", "255.255.255", "unstable"])
async def test_a_server_that_is_new_enough_is_not_refused(
    fake: FakeServer, layer: RedisPersistenceLayer, version: str
) -> None:
    fake.answer = about(redis_version=version)
    await layer.open()


@pytest.mark.parametrize(
    ("settings", "warned_of"),
    [
        ({"maxmemory": "0", "maxmemory_policy": "allkeys-lru"}, []),
        ({"maxmemory": "1000", "maxmemory_policy": "noeviction"}, []),
        ({"maxmemory": "1000", "maxmemory_policy": "volatile-ttl"}, ["maxmemory-policy is volatile-ttl"]),
        ({"aof_enabled": "1"}, []),
        ({"aof_enabled": "0", "save": "3600 1"}, []),
        ({"aof_enabled": "0"}, ["appendonly is no and save is empty"]),
        ({"aof_enabled": "0", "maxmemory_policy": "allkeys-lru"}, ["maxmemory-policy is", "appendonly is no"]),
    ],
)
async def test_settings_that_endanger_records_are_logged_once(
    fake: FakeServer,
    layer: RedisPersistenceLayer,
    caplog: pytest.LogCaptureFixture,
    settings: dict[str, str],
    warned_of: list[str],
) -> None:
    fake.answer = about(redis_version="7.0.0", **settings)
    for _ in range(2):
        await layer.open()
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(warned_of)
    assert all(what in warning for what, warning in zip(warned_of, warnings, strict=True))


def diagnosed_as(*, save: str = "3600 1", appendfsync: str = "always", behind_seconds: float = 0, **info: str) -> Any:
    """Return what a server answers whose settings, clock and INFO are these."""
    settings = {"save": save, "appendfsync": appendfsync, "maxmemory-policy": "noeviction", "appendonly": "yes"}
    tell = about(**{"redis_version": "7.0.0", "role": "master", "connected_slaves": "1", "maxmemory": "0"} | info)

    def answer(command: list[bytes]) -> bytes:
        if command[0] == b"TIME":
            return f"*2\r\n$10\r\n{int(time.time() - behind_seconds)}\r\n$1\r\n0\r\n".encode()
        if command[0] == b"CONFIG":
            name = command[2].decode()
            value = settings.get(name, "0")
            return f"*2\r\n${len(name)}\r\n{name}\r\n${len(value)}\r\n{value}\r\n".encode()
        reply: bytes = tell(command)
        return reply

    return answer


@pytest.mark.parametrize(
    ("server", "problems"),
    [
        ({}, []),
        ({"aof_enabled": "1"}, []),
        ({"role": "slave"}, ["this server is a replica, which takes no writes; connect to its primary"]),
        ({"cluster_enabled": "1"}, ["this server is a node of a cluster, which has only some of the keys; connect by"]),
        (
            {"aof_enabled": "1", "appendfsync": "everysec"},
            ["appendfsync is everysec: a power failure loses up to a sec"],
        ),
        ({"aof_enabled": "1", "appendfsync": "no"}, ["appendfsync is no: a power failure loses up to half a minute"]),
        ({"aof_enabled": "0", "save": ""}, ["appendonly is no and save is empty"]),
        ({"rdb_last_bgsave_status": "err"}, ["the last write for save failed (rdb_last_bgsave_status is err)"]),
        ({"aof_last_write_status": "err"}, ["the last write for appendonly failed (aof_last_write_status is err)"]),
        ({"behind_seconds": 100}, ["s ahead of the store's: `aidem list` judges states by it; set it by NTP"]),
        ({"behind_seconds": -100}, ["s behind the store's: `aidem list` judges"]),
    ],
)
async def test_a_diagnosis_tells_what_endangers_records(
    fake: FakeServer, layer: RedisPersistenceLayer, server: dict[str, Any], problems: list[str]
) -> None:
    fake.answer = diagnosed_as(**server)
    facts, found = await layer.diagnose()
    assert len(found) == len(problems)
    assert all(problem in text for problem, text in zip(problems, found, strict=True))
    assert facts["server"] == "Redis 7.0.0"
    assert facts["replicas"] == "1"
    assert facts["maxmemory"] == "no limit"
    assert facts["maxmemory-policy"] == "noeviction"


async def test_a_diagnosis_tells_what_the_acl_does_not_show(fake: FakeServer, layer: RedisPersistenceLayer) -> None:
    fake.answer = lambda _command: b"-NOPERM no\r\n"
    facts, problems = await layer.diagnose()
    assert facts["role"] == facts["appendonly"] == facts["replicas"] == "not shown by its ACL"
    assert problems == ()


@pytest.mark.parametrize("reply", [b"-NOPERM no\r\n", b"-ERR unknown command 'INFO'\r\n", b"*0\r\n"])
async def test_what_the_server_does_not_show_is_not_asked_for_again(
    fake: FakeServer, layer: RedisPersistenceLayer, caplog: pytest.LogCaptureFixture, reply: bytes
) -> None:
    tell = about(redis_version="7.0.0", aof_enabled="0")
    fake.answer = lambda command: tell(command) if command[0] == b"INFO" and reply == b"*0\r\n" else reply
    await layer.open()
    assert caplog.records == []


async def test_a_server_that_cannot_remember_a_script_nor_take_it_in_full_is_not_asked_for_ever(
    fake: FakeServer, layer: RedisPersistenceLayer
) -> None:
    fake.answer = lambda _command: b"-NOSCRIPT No matching script.\r\n"
    with pytest.raises(IdempotencyPersistenceLayerError, match="NOSCRIPT"):
        await claimed(layer)
    assert [command[0] for command in fake.commands if command[0] != b"CLIENT"] == [b"EVALSHA", b"EVAL"]


async def test_opening_fails_where_nothing_works(fake: FakeServer, layer: RedisPersistenceLayer) -> None:
    fake.answer = lambda _command: b"-NOAUTH Authentication required.\r\n"
    with pytest.raises(IdempotencyPersistenceConfigError, match="username and password"):
        await layer.open()


async def test_opening_ends_at_once_when_it_is_cancelled(fake: FakeServer) -> None:
    layer = RedisPersistenceLayer(fake.url, timeout_seconds=50)
    fake.answer = lambda _command: None
    opening = asyncio.ensure_future(layer.open())

    async def was_asked() -> bool:
        return any(command[0] == b"INFO" for command in fake.commands)

    await until(was_asked)
    opening.cancel()
    await asyncio.wait([opening], timeout=20)
    assert opening.cancelled()
    await layer._connections.here().abort()


async def test_a_server_that_refuses_to_be_listened_to_is_not_asked_again_and_that_is_logged_once(
    fake: FakeServer, layer: RedisPersistenceLayer, caplog: pytest.LogCaptureFixture
) -> None:
    fake.answer = lambda _command: b"-NOPERM this user has no permissions to access one of the channels\r\n"
    for _ in range(2):
        with pytest.raises(IdempotencyPersistenceConfigError, match="NOPERM"):
            await layer.wait_for_change("key", 20)
    assert [command[0] for command in fake.commands].count(b"SUBSCRIBE") == 1
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "aidem"]
    assert warning.startswith("Redis: waiting callers are not woken, and poll instead: Redis ")


async def test_a_server_that_cannot_be_listened_to_just_now_is_asked_again(
    fake: FakeServer, layer: RedisPersistenceLayer
) -> None:
    fake.answer = lambda _command: b"-LOADING Redis is loading the dataset in memory\r\n"
    for _ in range(2):
        with pytest.raises(IdempotencyPersistenceConnectionError, match="LOADING"):
            await layer.wait_for_change("key", 20)
    assert [command[0] for command in fake.commands].count(b"SUBSCRIBE") == 2


async def test_a_listener_whose_connection_breaks_is_told_so(fake: FakeServer, layer: RedisPersistenceLayer) -> None:
    fake.answer = lambda _command: fake.hang_up()
    with pytest.raises(IdempotencyPersistenceConnectionError, match="lost"):
        await layer.wait_for_change("key", 20)


async def test_a_client_that_would_try_again_and_again_does_not_keep_an_error_back(vacant_port: int) -> None:
    client = Redis(port=vacant_port, retry=Retry(ConstantBackoff(60), 5))
    layer = RedisPersistenceLayer(client=client, timeout_seconds=50)
    with pytest.raises(IdempotencyPersistenceConnectionError, match=r"cannot be reached \(ConnectionRefusedError\)"):
        await asyncio.wait_for(layer.get("key"), 20)
    await layer.aclose()
    await client.aclose()


async def test_a_claim_that_was_never_sent_is_neither_released_nor_logged(vacant_port: int, caplog: Any) -> None:
    layer = RedisPersistenceLayer(f"redis://127.0.0.1:{vacant_port}")

    @idempotent_function(persistence_store=layer)
    async def charge(order: int) -> int:
        return order

    with pytest.raises(IdempotencyPersistenceConnectionError, match="cannot be reached") as failed:
        await charge(1)
    await layer.aclose()
    assert failed.value.may_be_applied is False
    assert not caplog.messages


async def test_a_listener_that_cannot_connect_is_told_so(vacant_port: int) -> None:
    layer = RedisPersistenceLayer(f"redis://127.0.0.1:{vacant_port}")
    with pytest.raises(IdempotencyPersistenceConnectionError, match="cannot be reached"):
        await layer.wait_for_change("key", 20)
    await layer.aclose()


def test_a_failure_of_the_handshake_that_says_nothing_more_is_a_failure_of_the_connection() -> None:
    failure = connecting_failed(EOFError(), address="host:1", timeout_seconds=1)
    assert isinstance(failure, IdempotencyPersistenceConnectionError)
    assert "host:1 cannot be reached (EOFError)" in str(failure)
    failure = connecting_failed(ssl.SSLEOFError(), address="host:1", timeout_seconds=1)
    assert isinstance(failure, IdempotencyPersistenceConnectionError)


# --- Users and certificates -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Certificates:
    directory: Path

    def __getitem__(self, name: str) -> str:
        return str(self.directory / name)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    made = Certificates(tmp_path_factory.mktemp("certificates"))
    for command in (
        "req -x509 -newkey rsa:2048 -nodes -subj /CN=ca -keyout ca.key -out ca.pem -addext keyUsage=keyCertSign",
        "req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr",
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile names -out server.pem",
    ):
        (made.directory / "names").write_text("subjectAltName=DNS:localhost\nauthorityKeyIdentifier=keyid\n")
        subprocess.run(["openssl", *command.split()], cwd=made.directory, check=True, capture_output=True)
    return made


@pytest.fixture(scope="module")
def tls_server(certificates: Certificates) -> Iterator[RedisServer]:
    port = free_port()
    rights = "~aidem* &aidem:* +evalsha +eval +get +set +del +pttl +publish +subscribe +unsubscribe +time"
    with started(
        "redis",
        *("--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no"),
        *("--tls-cert-file", certificates["server.pem"], "--tls-key-file", certificates["server.key"]),
        *("--tls-ca-cert-file", certificates["ca.pem"]),
        *("--user", "payments", "on", f">{PASSWORD}", *rights.split(), "--user", "default", "off"),
        port=port,
    ) as server:
        yield server


async def test_a_user_with_few_rights_works_over_tls(tls_server: RedisServer, certificates: Certificates) -> None:
    url = f"rediss://payments:{PASSWORD}@localhost:{tls_server.port}/0?ssl_ca_certs={certificates['ca.pem']}"
    async with RedisPersistenceLayer(url) as layer, RedisPersistenceLayer(url) as other:
        record = await claimed(layer, "aidem#key")
        waiting = asyncio.ensure_future(other.wait_for_change("aidem#key", 50))
        await other.wait_for_change("aidem#other", 1)
        assert await layer.renew(record, now=0) is not None
        assert await completed(layer, record)
        await asyncio.wait_for(waiting, 20)
        with pytest.raises(IdempotencyPersistenceConfigError, match="NOPERM: its ACL denies"):
            await claimed(layer, "foreign#key")
        await layer.forget("aidem#key")


async def test_closing_does_not_wait_for_a_server_that_hangs(
    tls_server: RedisServer, certificates: Certificates
) -> None:
    async with Proxy.to(tls_server.port) as proxy:
        url = f"rediss://payments:{PASSWORD}@localhost:{proxy.port}/0?ssl_ca_certs={certificates['ca.pem']}"
        layer = RedisPersistenceLayer(url)
        waiting = asyncio.ensure_future(layer.wait_for_change("aidem#key", 50))

        async def is_woken() -> bool:
            return await layer.release(await claimed(layer, "aidem#key")) and waiting.done()

        await until(is_woken)
        assert proxy.open_connections == 2
        proxy.hold()
        await asyncio.wait_for(layer.aclose(), 10)  # a farewell of TLS would be waited for much longer
        sockets = [
            transport.get_extra_info("socket")
            for transport in gc.get_objects()
            if isinstance(transport, asyncio.Transport)
            and transport.get_extra_info("peername") == ("127.0.0.1", proxy.port)
        ]

    async def are_closed() -> bool:
        return all(socket.fileno() == -1 for socket in sockets)

    await until(are_closed)  # or a collection of garbage finds the farewell that is still waited for


async def test_a_client_of_the_user_brings_its_own_certificates(
    tls_server: RedisServer, certificates: Certificates
) -> None:
    async with (
        Redis(
            host="localhost",
            port=tls_server.port,
            username="payments",
            password=PASSWORD,
            ssl=True,
            ssl_ca_certs=certificates["ca.pem"],
        ) as client,
        RedisPersistenceLayer(client=client) as layer,
    ):
        assert (await claimed(layer, "aidem#own client")).owner == "ours"


async def test_nodes_of_a_cluster_are_spoken_to_with_tls_by_the_names_that_they_have_for_each_other(
    certificates: Certificates,
) -> None:
    plain, secure = free_port(), free_port()
    with started(
        "redis",
        *("--cluster-enabled", "yes", "--cluster-port", str(free_port()), "--tls-cluster", "yes"),
        *("--cluster-announce-hostname", "localhost", "--cluster-preferred-endpoint-type", "hostname"),
        *("--cluster-announce-ip", "127.0.0.1"),
        *("--port", str(plain), "--tls-port", str(secure), "--tls-auth-clients", "no"),
        *("--tls-cert-file", certificates["server.pem"], "--tls-key-file", certificates["server.key"]),
        *("--tls-ca-cert-file", certificates["ca.pem"]),
        port=plain,
    ) as server:
        told(server, "CLUSTER", "ADDSLOTSRANGE", 0, 16383)
        url = f"rediss+cluster://localhost:{secure}?ssl_ca_certs={certificates['ca.pem']}"
        async with RedisPersistenceLayer(url, timeout_seconds=20) as layer:
            assert (await claimed(layer)).owner == "ours"
            (line,) = await layer._connections.here().line.nodes()
            assert line.server.address == f"localhost:{secure}"  # type: ignore[attr-defined]
        told(server, "CONFIG", "SET", "cluster-preferred-endpoint-type", "ip")
        layer = RedisPersistenceLayer(url, timeout_seconds=20)
        with pytest.raises(IdempotencyPersistenceConfigError, match=r"127\.0\.0\.1.* does not trust its certificate"):
            await layer.open()
        await layer.aclose()


@pytest.mark.parametrize(
    ("url", "kind", "message"),
    [
        ("rediss://payments:secret-word@localhost:{port}", "Config", "does not trust its certificate"),
        ("rediss://payments:secret-word@127.0.0.1:{port}?ssl_ca_certs={ca}", "Config", "trust its certificate for"),
        ("rediss://payments:wrong-word@localhost:{port}?ssl_ca_certs={ca}", "Config", "username or the password"),
        ("rediss://localhost:{port}?ssl_ca_certs={ca}", "Config", "NOAUTH|username"),
        ("rediss://payments:secret-word@localhost:{port}/1?ssl_ca_certs={ca}", "Config", "NOPERM|its ACL denies"),
        ("redis://payments:secret-word@localhost:{port}", "Connection", "expects TLS"),
    ],
)
async def test_what_is_wrong_with_a_user_or_a_certificate_is_said_and_no_password(
    tls_server: RedisServer, certificates: Certificates, url: str, kind: str, message: str
) -> None:
    layer = RedisPersistenceLayer(url.format(port=tls_server.port, ca=certificates["ca.pem"]))
    with pytest.raises(IdempotencyPersistenceLayerError, match=message) as refused:
        await layer.open()
    assert type(refused.value).__name__ == f"IdempotencyPersistence{kind}Error"
    assert "-word" not in str(refused.value)


async def test_a_host_is_spoken_to_with_tls_unless_told_otherwise() -> None:
    with started("valkey") as server:
        layer = RedisPersistenceLayer(host="127.0.0.1", port=server.port, timeout_seconds=0.3)
        with pytest.raises(
            IdempotencyPersistenceConnectionError, match=r"within 0\.3 s.* expects TLS .* if the layer does"
        ):
            await layer.open()


async def test_what_answers_a_tls_handshake_with_something_else_is_refused() -> None:
    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"-ERR Protocol error: expected TLS\r\n")
        writer.close()

    async with listening(answer) as port:
        layer = RedisPersistenceLayer(host="127.0.0.1", port=port)
        with pytest.raises(IdempotencyPersistenceConfigError, match="does not speak TLS as the layer wants it"):
            await layer.open()


async def test_a_database_that_is_not_there_is_refused() -> None:
    with started("valkey") as server:
        layer = RedisPersistenceLayer(f"redis://127.0.0.1:{server.port}/99")
        with pytest.raises(IdempotencyPersistenceConfigError, match="db_index"):
            await layer.open()


async def test_a_caller_whose_user_may_not_listen_asks_again_until_the_owner_is_done(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with started("valkey", "--user", "deaf", "on", f">{PASSWORD}", "~*", "resetchannels", "+@all") as server:
        url = f"redis://deaf:{PASSWORD}@127.0.0.1:{server.port}"
        entered, leave = asyncio.Event(), asyncio.Event()

        async def charge(order: int) -> int:
            entered.set()
            await leave.wait()
            return order

        async with RedisPersistenceLayer(url) as layer, RedisPersistenceLayer(url) as elsewhere:
            options: dict[str, Any] = {"config": IdempotencyConfig(wait_timeout_seconds=20), "key_prefix": "charge"}
            here: Any = idempotent_function(persistence_store=layer, **options)(charge)
            there: Any = idempotent_function(persistence_store=elsewhere, **options)(charge)
            owner = asyncio.ensure_future(here(order=1))
            await entered.wait()
            caplog.clear()
            waiters = [asyncio.ensure_future(there(order=1)) for _ in range(3)]

            async def is_told() -> bool:
                return any("not woken" in record.getMessage() for record in caplog.records)

            await until(is_told)
            leave.set()
            assert list(await asyncio.wait_for(asyncio.gather(owner, *waiters), 20)) == [1] * 4
        assert len([record for record in caplog.records if "not woken" in record.getMessage()]) == 1


# --- Servers in trouble ---------------------------------------------------------------------------------------------


async def test_a_full_server_refuses_claims_and_still_takes_releases() -> None:
    with started("redis") as server:
        async with client_of(server) as client, RedisPersistenceLayer(server.url) as layer:
            record = await claimed(layer)
            await client.config_set("maxmemory", 1)
            with pytest.raises(IdempotencyPersistenceConnectionError, match="OOM: it is out of memory"):
                await claimed(layer, "other")
            assert await layer.release(record)


async def test_a_replica_refuses_claims() -> None:
    with started("redis") as primary, started("redis", "--replicaof", f"127.0.0.1 {primary.port}") as replica:
        async with RedisPersistenceLayer(replica.url) as layer:
            with pytest.raises(IdempotencyPersistenceConnectionError, match=r"READONLY|MASTERDOWN|LOADING"):
                await claimed(layer)


async def test_a_kill_loses_nothing_that_was_answered_where_the_log_is_kept() -> None:
    with started("redis", "--appendonly", "yes", "--appendfsync", "always") as server:
        layer = RedisPersistenceLayer(server.url)
        record = await claimed(layer)
        server.kill()
        with pytest.raises(IdempotencyPersistenceConnectionError):
            await claimed(layer, "other")
        server.start()
        assert isinstance(await acquired_when_loaded(layer, "theirs"), object)
        assert await completed(layer, record)
        async with client_of(server) as client:
            assert (await stored(client))["fence"] == record.fence
        await layer.aclose()


async def acquired_when_loaded(layer: RedisPersistenceLayer, owner: str) -> Any:
    async with asyncio.timeout(30):
        while True:
            try:
                return await acquired(layer, owner=owner)
            except IdempotencyPersistenceConnectionError:
                await asyncio.sleep(0.01)


async def test_a_kill_loses_all_claims_where_no_log_is_kept_and_the_late_owner_still_records() -> None:
    with started("valkey") as server:
        layer = RedisPersistenceLayer(server.url)
        record = await claimed(layer)
        server.kill()
        server.start()
        assert (await acquired_when_loaded(layer, "ours")).record.fence > record.fence
        await layer.forget("key")
        assert await completed(layer, record)
        await layer.aclose()
