"""aidem makes asyncio code safe to retry: a call named by an idempotency key runs once within a window."""

from aidem._api.block import BlockExecution, idempotency
from aidem._api.decorators import idempotent, idempotent_function
from aidem._api.execution import Execution, current_execution
from aidem._api.keys import block_key, idempotency_key
from aidem._distribution import __version__
from aidem._rules.abandoned import AbandonedExecution, DidNotHappen, Happened, StillUnknown, Verdict
from aidem._rules.record import DataRecord, RecordStatus
from aidem.config import IdempotencyConfig, configure, register_lambda_context

__all__ = [
    "AbandonedExecution",
    "BlockExecution",
    "DataRecord",
    "DidNotHappen",
    "Execution",
    "Happened",
    "IdempotencyConfig",
    "RecordStatus",
    "StillUnknown",
    "Verdict",
    "__version__",
    "block_key",
    "configure",
    "current_execution",
    "idempotency",
    "idempotency_key",
    "idempotent",
    "idempotent_function",
    "register_lambda_context",
]
