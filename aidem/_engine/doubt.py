"""A claim in doubt whose fate a check can tell: taken over, checked, and then run, recorded or put back.

    in doubt ── take_over ──► ours, renewed, ── Happened ──────► completed, and replayed
        ▲                     while the check   ── DidNotHappen ──► confirmed at the store, and the body runs
        └──── put back ────── is asked       ── anything else ──► in doubt, as it was found

While the check is asked, the store holds a claim of ours, which nobody may take over: whoever finds it waits, and if we
vanish it is in doubt again when its lease passes. It is put back with a new owner and fence, so that neither the owner
that vanished nor a request of ours that arrives late can change it, and with the end of its lease as it was found, so
that it stays known since when it is in doubt.

The body runs only after the store has confirmed that the claim is still ours: the check may have taken longer than the
lease, and somebody else may have taken the claim over, checked it and run.
"""

from __future__ import annotations

import asyncio
import logging
import os
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Literal

from aidem._engine.claim import RELEASE_SECONDS, may_be_claimed
from aidem._engine.failures import FOUND_HAPPENED, NOTHING_RUN
from aidem._rules.abandoned import VERDICTS, AbandonedExecution, DidNotHappen, Happened, StillUnknown
from aidem._rules.record import OutcomeKind
from aidem._runtime.cancellation import CLEANUP_SECONDS, CancellationShield, in_background
from aidem.exceptions import (
    IdempotencyError,
    IdempotencyInDoubtError,
    IdempotencyPersistenceLayerError,
    IdempotencySerializationError,
    IdempotencyUsageError,
)
from aidem.hooks import EventKind
from aidem.serialization import UNAVAILABLE_TEXT, round_trip

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aidem._engine.claim import Claim
    from aidem._engine.plan import CallKey, Plan
    from aidem._rules.abandoned import Verdict
    from aidem._rules.record import DataRecord
    from aidem.hooks import Reporter

logger = logging.getLogger("aidem")


class Resolution(Enum):
    """What has become of a claim in doubt."""

    RUN = auto()  # the effect did not happen: the body runs under our claim
    REPLAY = auto()  # it happened, and the record of our claim is its outcome
    REFUSED = auto()  # it was not there any more: another caller has taken it over, or its owner has come back
    LOST = auto()  # another caller has taken over our claim


class Doubt:
    """A claim in doubt that a call has found, and the claim of the call that takes its place."""

    __slots__ = ("_ahead_seconds", "_claim", "_found", "_in_doubt", "_is_open", "_key", "_plan", "_reporter", "_shield")

    def __init__(
        self,
        plan: Plan,
        key: CallKey,
        claim: Claim,
        found: DataRecord,
        reporter: Reporter,
        *,
        ahead_seconds: float,
    ) -> None:
        self._plan = plan
        self._key = key
        self._claim = claim
        self._found = found
        self._in_doubt = found.replace(owner=os.urandom(16).hex())
        self._reporter = reporter
        self._ahead_seconds = ahead_seconds
        self._is_open = True  # whether our claim may be at the store and has to be put back
        self._shield = CancellationShield()

    async def resolve(
        self, ask_check: Callable[[AbandonedExecution], Awaitable[Any]], *, has_body_ended: Callable[[], bool]
    ) -> Resolution:
        """Take the claim over, ask the check, and do what its verdict says.

        Args:
            ask_check: Asks it; called at most once.
            has_body_ended: Tells whether the task or thread that asks, and then runs the body, is gone.

        Raises:
            IdempotencyInDoubtError: The check does not know, or has failed; then that is the cause.
            IdempotencyPersistenceLayerError: The layer failed; nothing was run.
        """
        try:
            with self._shield as shield:
                is_ours = await self._take_over(shield)
            if not is_ours:
                return Resolution.REFUSED
            self._claim.hold(taken_over=True, has_body_ended=has_body_ended)
            verdict, failure = await self._verdict(ask_check)
            self._report(verdict, failure)
            self._shield = self._claim.completion_shield() if isinstance(verdict, Happened) else CancellationShield()
            with self._shield as shield:
                return await self._act_on(verdict, failure, shield)
        except BaseException:
            if self._is_open:  # a signal handler raised, or the coroutine is closed: nothing may be awaited any more
                self._claim.stop_renewal()
                in_background(self._put_back_unattended, after=self._shield.operation)
            raise

    async def _take_over(self, shield: CancellationShield) -> bool:
        try:
            self._is_open = await self._claim.take_over(self._found, shield=shield)
        except IdempotencyError as failure:
            if may_be_claimed(failure):
                await self._put_back_unused(shield)
            self._is_open = False
            raise
        if self._is_open and shield.is_pending:
            await self._put_back(shield)
        return self._is_open

    async def _verdict(
        self, ask_check: Callable[[AbandonedExecution], Awaitable[Any]]
    ) -> tuple[Verdict, Exception | None]:
        """Return what the check says, and why it does not know, if it has failed."""
        abandoned = AbandonedExecution(
            key=self._key.text, payload=self._key.payload, record=self._found, fence=self._claim.record.fence
        )
        try:
            verdict = await ask_check(abandoned)
        except Exception as error:  # noqa: BLE001 - whatever a function of the user's raises is the cause of our error
            return self._failed(error)
        except GeneratorExit:
            raise
        except BaseException:
            shield = CancellationShield()
            shield.bound(CLEANUP_SECONDS)
            await self._put_back(shield)
            shield.request_again()
            raise
        if isinstance(verdict, VERDICTS):
            return verdict, None
        message = (
            f"the check in on_abandoned returned {type(verdict).__name__}; return Happened(result), DidNotHappen() or "
            "StillUnknown()"
        )
        return self._failed(IdempotencyUsageError(message, key=self._key.text))

    def _report(self, verdict: Verdict, failure: Exception | None) -> None:
        match verdict:
            case Happened():
                told: Literal["happened", "did_not_happen", "still_unknown"] = "happened"
            case DidNotHappen():
                told = "did_not_happen"
            case _:
                told = "still_unknown"
        self._reporter.report(EventKind.CHECKED, fence=self._claim.record.fence, error=failure, verdict=told)

    def _failed(self, error: Exception) -> tuple[Verdict, Exception]:
        # Only messages of ours: others may show what is in the payload.
        reason = error if isinstance(error, IdempotencyError) else type(error).__name__
        logger.error("the check of %s failed: %s", self._plan.function, reason)
        return StillUnknown(), error

    async def _act_on(self, verdict: Verdict, failure: Exception | None, shield: CancellationShield) -> Resolution:
        try:
            if isinstance(verdict, Happened):
                return await self._complete(verdict.result, shield)
            if isinstance(verdict, DidNotHappen):
                return await self._confirm(shield)
        except IdempotencyPersistenceLayerError:
            await self._put_back_unused(shield)
            raise
        in_doubt = await self._put_back_unused(shield, within_seconds=CLEANUP_SECONDS)
        if in_doubt is None:
            self._claim.note_loss()
            return Resolution.LOST
        raise IdempotencyInDoubtError(record=in_doubt) from failure

    async def _complete(self, result: Any, shield: CancellationShield) -> Resolution:
        try:
            text, kind = round_trip(result, self._plan.serializer)[0], None
        except IdempotencySerializationError as fault:
            logger.error("what the check of %s says happened cannot be replayed: %s", self._plan.function, fault)  # noqa: TRY400 - no trace: it may show the result
            text, kind = UNAVAILABLE_TEXT, OutcomeKind.UNAVAILABLE
        outcome = await self._claim.complete(text, kind, shield=shield, effect=FOUND_HAPPENED)
        self._is_open = False
        if outcome is None:
            self._claim.note_loss()
            return Resolution.LOST
        self._claim.record = outcome
        return Resolution.REPLAY

    async def _confirm(self, shield: CancellationShield) -> Resolution:
        is_ours = await self._claim.confirm(shield, effect=NOTHING_RUN)
        if is_ours and shield.is_pending:
            await self._put_back(shield)
        self._is_open = False
        if is_ours:
            return Resolution.RUN
        self._claim.stop_renewal()
        return Resolution.LOST

    # --- In doubt again ---------------------------------------------------------------------------------------------

    async def _put_back(self, shield: CancellationShield) -> DataRecord | None:
        """Put the claim back as it was found; return it as stored, or ours if the layer fails; None: ours is gone."""
        self._claim.stop_renewal()
        if not self._claim.is_of_this_process():
            return None
        try:
            stored = await self._claim.put_back(self._in_doubt, ahead_seconds=self._ahead_seconds, shield=shield)
        except IdempotencyError as failure:
            function = self._plan.function
            logger.warning("the claim of %s is in doubt again only when its lease passes: %s", function, failure)
            stored = self._claim.record
        self._is_open = False
        return stored

    async def _put_back_unused(
        self, shield: CancellationShield, *, within_seconds: float = RELEASE_SECONDS
    ) -> DataRecord | None:
        """Do so while the caller waits for its error, unless it is cancelled: then the bound of that counts."""
        if not shield.is_pending:
            shield.deadline = asyncio.get_running_loop().time() + within_seconds
        return await self._put_back(shield)

    async def _put_back_unattended(self) -> None:
        shield = CancellationShield()
        shield.bound(CLEANUP_SECONDS)
        await self._put_back(shield)
