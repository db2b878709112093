"""The servers that benchmarks talk to, each a process of its own on a free port."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import botocore

from tests.support import aws_servers, postgres, servers

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def redis_server() -> Iterator[servers.RedisServer]:
    """Run Redis as the docs want it: with an append-only file, and evicting nothing."""
    with servers.started("redis", "--appendonly", "yes", "--maxmemory-policy", "noeviction") as server:
        yield server


@contextmanager
def postgres_server() -> Iterator[str]:
    """Run PostgreSQL with durable commits, and return its URL; TMPDIR must lie on a disk."""
    settings = ("fsync=on", "full_page_writes=on", "autovacuum=on", "shared_preload_libraries=pg_stat_statements")
    with postgres.started(*settings) as server:
        asyncio.run(_with_statistics(server.url))
        yield server.url


async def _with_statistics(url: str) -> None:
    async with postgres.connected(url) as connection:
        await connection.execute("CREATE EXTENSION pg_stat_statements")


@contextmanager
def instant_dynamodb() -> Iterator[str]:
    """Run the stub of `_instant_dynamodb`, point the AWS environment of this process at it, and return its URL."""
    port = servers.free_port()
    command = [sys.executable, str(Path(__file__).with_name("_instant_dynamodb.py")), str(port)]
    with aws_servers.started(command, port) as url:
        os.environ.update(aws_servers.Database(url).environment)
        yield url


@contextmanager
def instant_dynamodb_with_tls() -> Iterator[None]:
    """Run the stub with TLS, as DynamoDB is reached, and point the AWS environment of this process at it.

    Clients verify its certificate against the certificates of botocore with this one added, so that they load as many
    as they do for AWS.
    """
    port, tls_port = servers.free_port(), servers.free_port()
    with tempfile.TemporaryDirectory(prefix="aidem-benchmark-") as name:
        key, certificate, bundle = (str(Path(name, part)) for part in ("key.pem", "certificate.pem", "bundle.pem"))
        names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
        make = [servers.installed("openssl"), "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", *names]
        subprocess.run([*make, "-keyout", key, "-out", certificate], check=True, capture_output=True)
        public = Path(botocore.__file__).with_name("cacert.pem").read_text(encoding="utf-8")
        Path(bundle).write_text(public + Path(certificate).read_text(encoding="utf-8"), encoding="utf-8")
        command = [sys.executable, str(Path(__file__).with_name("_instant_dynamodb.py")), str(port)]
        with aws_servers.started([*command, str(tls_port), certificate, key], port):
            os.environ.update(aws_servers.Database(f"https://127.0.0.1:{tls_port}").environment, AWS_CA_BUNDLE=bundle)
            yield


def requests_so_far(url: str) -> Counter[str]:
    """Return how many requests of each kind the stub has had."""
    with urllib.request.urlopen(url) as answer:
        return Counter(json.load(answer))


@contextmanager
def directory_on_disk() -> Iterator[Path]:
    """Make a directory for databases; set TMPDIR where temporary files do not lie on a disk."""
    with tempfile.TemporaryDirectory(prefix="aidem-benchmark-") as name:
        yield Path(name)
