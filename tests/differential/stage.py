"""Runs a scenario on one side, and notes what is seen of it."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.differential import functions
from tests.differential.scenario import Call, Change, Forget, Replace, Scenario, Step
from tests.differential.seen import Seen, answer_of, kinds_of, shown
from tests.differential.sides import Of, Side
from tests.differential.stores import Store, records_of


@dataclass
class Stage:
    """A scenario on one side, while it runs.

    Attributes:
        function: What the scenario calls.
        ran: The arguments of each run of the body in this step.
        claims: The records that were there when the body began, in this step.
        runs: How often the body ran in all steps.
    """

    side: Side
    scenario: Scenario
    store: Store
    layer: Any = None
    function: Any = None
    call: Call = field(default_factory=Call)
    ran: list[str] = field(default_factory=list)
    claims: list[dict[str, str]] = field(default_factory=list)
    runs: int = 0

    def play(self) -> list[Seen]:
        """Take all steps, in a context of their own: a registered Lambda context would outlast the scenario."""
        return contextvars.copy_context().run(self._play)

    def _play(self) -> list[Seen]:
        self.store.prepare(self.scenario.layer)
        self.layer = self.another_layer()
        functions.STAGE.set(self)
        sights = [self._look(self._build)]
        if self.function is not None:
            sights += [self._look(lambda step=step: self._take(step)) for step in self.scenario.steps]  # type: ignore[misc]
        return sights

    def another_layer(self) -> Any:
        return self.store.layer(self.side.name)

    def _look(self, action: Callable[[], Any]) -> Seen:
        self.ran, self.claims = [], []
        meanings = frozenset[str]()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                answer = f"returned {shown(action())}"
            except (Exception, KeyboardInterrupt, functions.Killed) as error:  # noqa: BLE001 - it is what is looked at
                answer, meanings = answer_of(error)
        return Seen(
            answer=answer,
            meanings=meanings,
            ran=tuple(self.ran),
            claims=tuple(self.claims),
            records=records_of(self.store),
            warned=kinds_of(caught),
        )

    # --- The function -------------------------------------------------------------------------------------------------

    def _build(self) -> str:
        build = self.scenario.build or (lambda stage: stage.decorated(stage.scenario.function))
        self.function = build(self)
        return "a function"

    def decorated(self, function: Callable[..., Any], config: Mapping[str, Any] | None = None, **options: Any) -> Any:
        """Return a function as the scenario decorates it; options that are given here go before."""
        chosen: dict[str, Any] = {"persistence_store": self.layer, **self.scenario.options, **options}
        chosen = {name: value.on(self.side) if isinstance(value, Of) else value for name, value in chosen.items()}
        chosen["config"] = self.config(self.scenario.config if config is None else config)
        if self.scenario.handler:
            return self.side.idempotent(**chosen)(self.observed(function))
        data = {"data_keyword_argument": self.scenario.data} | chosen
        return self.side.idempotent_function(**data)(self.observed(function))

    def config(self, settings: Mapping[str, Any]) -> Any:
        context = (
            {} if self.scenario.handler or self.scenario.context is None else {"lambda_context": self.scenario.context}
        )
        return self.side.config(**self.side.defaults | context | dict(settings))

    def observed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its runs noted."""
        if inspect.iscoroutinefunction(function):
            return function

        @functools.wraps(function)
        def observed(*args: Any, **kwargs: Any) -> Any:
            arguments = [arg for arg in args if isinstance(arg, str | int | dict)]
            self.ran.append(shown([*arguments, kwargs] if kwargs else arguments))
            self.claims += records_of(self.store)
            self.runs += 1
            return function(*args, **kwargs)

        return observed

    # --- The steps ----------------------------------------------------------------------------------------------------

    def _take(self, step: Step) -> Any:
        match step:
            case Call():
                self.call = copy.deepcopy(step)  # bodies may change their payload
                return self.again()
            case Change(attributes):
                return self.store.change(attributes)
            case Replace(text):
                return self.store.replace(text)
            case Forget():
                return self.store.forget()

    def again(self) -> Any:
        """Make the current call, also from within its own body."""
        call, kwargs = self.call, dict(self.call.kwargs)
        args = call.args
        if self.scenario.handler:
            args = (call.payload, self.scenario.context if call.context is ... else call.context, *args)
        elif call.payload is not ...:
            kwargs[self.scenario.data] = call.payload
        if call.inside_loop:
            return asyncio.run(_inside_loop(lambda: self.function(*args, **kwargs)))
        return self.function(*args, **kwargs)


async def _inside_loop(function: Callable[[], Any]) -> Any:
    return function()
