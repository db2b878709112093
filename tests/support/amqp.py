"""An AMQP 0-9-1 broker for tests: GarageMQ of Debian, in a directory and on a port of its own.

RabbitMQ itself would bring Erlang: 43 packages where GarageMQ is one of 3.4 MB, which is installed in two seconds and
starts in a quarter of one. It speaks the same protocol: acknowledgements, redelivery when a connection ends, publisher
confirms. It knows no dead letter exchange, and the program publishes its dead letters itself.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.support.servers import free_port, installed

START_SECONDS = 20.0
CONFIG = """
proto: amqp-rabbit
users: [{{username: guest, password: 084e0343a0486ff05530df6c705c8bb4}}]  # guest, as MD5
security: {{passwordCheck: md5}}
tcp: {{ip: 127.0.0.1, port: {port}, nodelay: true, readBufSize: 65536, writeBufSize: 65536}}
admin: {{ip: 127.0.0.1, port: {admin_port}}}
queue: {{shardSize: 64, maxMessagesInRam: 1024}}
db: {{defaultPath: {directory}, engine: badger}}
vhost: {{defaultPath: /}}
connection: {{channelsMax: 64, frameMaxSize: 65536}}
"""


@contextlib.contextmanager
def started_amqp() -> Iterator[int]:
    """Run a broker until the end of the block, and give its port."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="aidem-amqp-") as name:
        config = Path(name, "config.yaml")
        config.write_text(CONFIG.format(port=port, admin_port=free_port(), directory=Path(name, "db")))
        command = [installed("garagemq"), "--config", str(config)]
        with subprocess.Popen(command, cwd=name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as broker:
            try:
                deadline = time.monotonic() + START_SECONDS
                while not _accepts_connections(port):
                    assert broker.poll() is None, f"{command} did not start"
                    assert time.monotonic() < deadline, f"{command} does not answer"
                    time.sleep(0.01)
                yield port
            finally:
                broker.kill()


def _accepts_connections(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False
