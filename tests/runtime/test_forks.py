"""What a forked child inherits while another thread of its parent is in the middle of something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MEMORY = """
from aidem.persistence.memory import MemoryPersistenceLayer

def ask(clock):
    layer.clock = clock
    layer.acquire(claim_of("key", now=0), now=0)

layer = MemoryPersistenceLayer()
guard = layer._guard
"""

LOCAL_CACHE = """
from aidem._engine.shared import LocalCache

class Key(str):
    def __hash__(self):
        self.stop()
        return 0

def ask(stop):
    Key.stop = staticmethod(stop)
    cache.get(Key("key"), now=0.0)

cache = LocalCache()
guard = cache._guard
"""

DEFAULTS = """
import logging
from aidem import config

class Handler(logging.Handler):
    def emit(self, record):
        self.stop()

def ask(stop):
    Handler.stop = staticmethod(stop)
    config.default_persistence_store()

guard = config._opening
logging.getLogger("aidem").addHandler(Handler())
"""

SCENE = """
import os, signal, threading, time
from aidem.testing import claim_of

stopped, go_on = threading.Event(), threading.Event()

def stop():
    stopped.set()
    go_on.wait()
    return 0.0
{scene}
thread = threading.Thread(target=ask, args=(stop,))
thread.start()
stopped.wait()
assert guard.lock.locked()
child = os.fork()
if not child:
    signal.alarm(30)
    ask(time.time)
else:
    assert os.waitpid(child, 0)[1] == 0
    go_on.set()
    thread.join()
    print("done", flush=True)
"""


@pytest.mark.parametrize("scene", [MEMORY, LOCAL_CACHE, DEFAULTS], ids=["memory layer", "local cache", "defaults"])
def test_a_child_forked_while_another_thread_holds_a_lock_can_take_it(scene: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", SCENE.format(scene=scene)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "AIDEM_PERSISTENCE": ""},
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert (run.stdout, run.stderr) == ("done\n", "")
