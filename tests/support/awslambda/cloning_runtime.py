"""Lambda's runtime client in an environment that is restored several times from one snapshot, by fork.

A fork has none of the threads that a snapshot has, and shares sockets, which a snapshot does not: both are worse.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from awslambdaric import __main__
from awslambdaric.lambda_runtime_client import LambdaRuntimeClient

CLONES = 3

restore_next = LambdaRuntimeClient.restore_next


def restore_clones(client: Any) -> None:
    restore_next(client)
    for _ in range(CLONES - 1):
        if os.fork() == 0:
            break


LambdaRuntimeClient.restore_next = restore_clones
__main__.main(sys.argv)
