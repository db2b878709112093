"""An event loop that can vanish: what a process is to the coroutines that it runs.

Every task of the loop runs within `_Steps`, so the loop learns of the end of each step: a task waits for something, or
has ended. The loop is left there by an exception that asyncio lets through at once, as it does with Ctrl-C. Then
nothing on it goes on: what has vanished is referenced for ever, since Python would close a coroutine that it finalizes,
and so run its `finally`.

A killed process takes no finalizer, lock or connection with it, nor its threads. Here, threads are waited for instead:
what a thread does is done when its process vanishes.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import inspect
import math
import selectors
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, NoReturn, TypeVar, TypeVarTuple, Unpack, cast
from weakref import WeakSet

from aidem.exceptions import IdempotencyUsageError
from aidem.testing._databases import break_connections
from aidem.testing._lines import Line, frames_of, innermost_own_line

if TYPE_CHECKING:
    import socket
    from contextvars import Context

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

AFTERWARDS_STEPS: Final = 200
"""How many steps the tasks may take that a call has left behind."""

PATIENCE_SECONDS: Final = 1.0
"""How long is waited at most for a thread to end, or for what is cancelled when a process ends."""

# What `asyncio.sleep` sets a timer for; it has no public name.
_WAKE_SLEEPER: Final = getattr(asyncio.futures, "_set_result_unless_cancelled", None)

Call = Callable[[], Awaitable[object]]
Start = Callable[[], Awaitable[Any]]


class Vanished(KeyboardInterrupt):
    """Leaves the loop at once, since asyncio lets a KeyboardInterrupt through. Never enters a coroutine."""


class TooLong(Vanished):
    """The same, because what the loop runs did not end in time."""


_vanished: Final[list[object]] = []


class ProcessLoop(asyncio.SelectorEventLoop):
    """The loop of one process, in a thread of its own.

    `asyncio.sleep` takes no time: while nothing else can happen, the clock of the loop jumps to the next timer.

    Attributes:
        on_step: Called at the end of each step of a task, with what the task runs; may raise `Vanished`.
        on_operation: Carries out an operation of a persistence layer: its name, and what starts it.
        main: The task that is run to its end.
        steps: What the tasks run that have not ended.
        uses_sockets: Whether it is known to wait for any.
    """

    main: asyncio.Task[object]

    def __init__(self, *, timeout_seconds: float, context: Context, uses_sockets: bool) -> None:
        self.unwatch()
        self._seen_at = time.monotonic()
        self.steps: set[Steps] = set()
        self.uses_sockets = uses_sockets
        self._pending_operations = 0
        self._timeout_seconds = timeout_seconds
        self._context = context
        self._ends_at = self._seen_at + timeout_seconds
        self._depth = 0
        self._jumped_seconds = 0.0
        self._sleeps: list[asyncio.TimerHandle] = []
        self._afterwards_steps: int | None = None
        self._has_vanished = False
        self._is_given_up = False
        self._refusal: IdempotencyUsageError | None = None
        self._threads = threading.Condition()
        self._jobs = 0  # that threads of an executor have not ended
        self._messages = 0  # of threads, that the loop has not looked at
        self._executor: ThreadPoolExecutor | None = None
        self._older_threads = WeakSet(threading.enumerate())
        self._helpers: WeakSet[threading.Thread] = WeakSet()  # threads that have sent messages
        self._sockets: WeakSet[socket.socket] = WeakSet()
        super().__init__(_Selector(self))
        self.slow_callback_duration = math.inf  # to debug mode, a disturbance would be one

    def unwatch(self) -> None:
        """Let steps and operations go on as they would."""
        self.on_step: Callable[[Steps, bool], None] = _nothing
        self.on_operation: Callable[[str, Start], Awaitable[Any]] = lambda _name, start: self.operate(start)

    async def operate(self, start: Start) -> Any:
        """Carry out an operation of a persistence layer; until it has ended, somebody else may have to act."""
        self._pending_operations += 1
        try:
            return await start()
        finally:
            self._pending_operations -= 1

    # --- From the thread of the test ----------------------------------------------------------------------------------

    def run_in_thread(
        self, live: Callable[[ProcessLoop], None], on_end: Callable[[BaseException | None], object]
    ) -> threading.Thread:
        """Start a thread that lives the life of the process, and says how it has ended."""

        def run() -> None:
            failure: BaseException | None = None
            try:
                live(self)
            except BaseException as error:  # noqa: BLE001 - it is raised in the test
                failure = error
                self.vanish()
            finally:
                with contextlib.suppress(RuntimeError):  # the test has ended, and its loop is closed
                    on_end(failure)

        thread = threading.Thread(target=run, name="crash_everywhere", daemon=True)
        thread.start()
        return thread

    def is_blocked(self) -> bool:
        """Whether something that it runs neither ends nor waits."""
        return time.monotonic() - self._seen_at > self._timeout_seconds

    def give_up(self) -> None:
        """Raise `TooLong` in the thread as soon as the loop goes on, if it does."""
        self._is_given_up = True
        with contextlib.suppress(RuntimeError):  # it is closed
            self.call_soon_threadsafe(_nothing)

    # --- Running ------------------------------------------------------------------------------------------------------

    def start(self, call: Call) -> asyncio.Task[object]:
        """Start a task for the call, in a copy of the context in which `crash_everywhere` was called."""
        return self.create_task(self._called(call), context=self._context.copy())

    async def _called(self, call: Call) -> object:
        try:
            awaitable = new_awaitable(call)
        except IdempotencyUsageError as error:
            self.refuse(error)
        return await awaitable

    def refuse(self, error: IdempotencyUsageError) -> NoReturn:
        """Vanish because `crash_everywhere` is used in a way that cannot work."""
        self._refusal = error
        raise Vanished

    def run_to_end(self, task: asyncio.Task[Any]) -> str:
        """Run until the task has ended; return how.

        Raises:
            Vanished: `on_step` said so.
            TooLong: It has not ended in time.
            IdempotencyUsageError: It was refused.
        """
        self._ends_at = time.monotonic() + self._timeout_seconds
        self._run_until_done(task)
        if task.cancelled():
            return "raised CancelledError"
        error = task.exception()
        return "returned" if error is None else f"raised {type(error).__qualname__}"

    def _run_until_done(self, task: asyncio.Task[Any]) -> None:
        if not task.done():
            task.add_done_callback(lambda _: self.stop())
        while not task.done():
            self._run()

    def _run(self) -> None:
        try:
            self.run_forever()
        except Vanished:
            if self._refusal is not None:
                raise self._refusal from self._refusal.__cause__
            raise
        except (KeyboardInterrupt, SystemExit):
            pass  # of a task, which has ended with it

    def runs_call(self, steps: Steps) -> bool:
        """Whether these are the steps of the call itself, and not of a task that it has started."""
        return steps is self.main.get_coro()

    def main_waits_at(self) -> Line | None:
        """Return the user's line at which the call waits; None: there is none, or it does not wait."""
        steps = self.main.get_coro()
        return innermost_own_line(steps.coroutine) if isinstance(steps, Steps) else None

    def end(self) -> None:
        """End as a process does that has nothing more to do: what it has left behind goes on, then is cancelled.

        Tasks may take some steps, as long as they wait for nobody else. What does not end by then vanishes.
        """
        try:
            self._ends_at = time.monotonic() + PATIENCE_SECONDS
            self.wait_for_threads()
            self._afterwards_steps = AFTERWARDS_STEPS
            self._run()
            self._afterwards_steps = None
            self._ends_at = time.monotonic() + PATIENCE_SECONDS
            self._run_until_done(self.create_task(self._cancel(asyncio.all_tasks(self))))
        except Vanished:
            self.vanish()
        else:
            self.close()

    async def _cancel(self, tasks: set[asyncio.Task[Any]]) -> None:
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await self.shutdown_asyncgens()

    def vanish(self) -> None:
        """Stop for ever. Connections break, as the operating system would see to it."""
        tasks = asyncio.all_tasks(self)
        for task in tasks:
            asyncio._unregister_task(task)  # noqa: SLF001 - documented, under "Extending"
        if not _vanished:  # it outlives the interpreter: at its exit, too, a coroutine would be closed
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(_vanished))
        _vanished.append((self, tasks, self.steps, self._find_belongings() if self.uses_sockets else ()))
        self.set_exception_handler(lambda _loop, _context: None)  # the task that was left has an exception of ours
        with self._threads:
            self._has_vanished = True
        this = cast("Any", self)
        transports = list(this._transports.values())  # noqa: SLF001 - of accepted connections, too
        accepted = {transport._sock for transport in transports} - {None}  # noqa: SLF001
        for sock in accepted | set(self._sockets):
            sock.close()  # without a word to its protocol
        this._close_self_pipe()  # noqa: SLF001 - or the pipe would stay open
        this._selector.close()  # noqa: SLF001 - or it would stay open, too
        frames = [frame for steps in self.steps for frame in frames_of(steps.coroutine)]
        held = [value for frame in frames for value in frame.f_locals.values()]
        break_connections(held, set(self._helpers), self._older_threads, PATIENCE_SECONDS)
        for thread in threading.enumerate():
            if getattr(thread, "loop", None) is self:  # a worker of anyio.to_thread, which ends with its loop
                cast("Any", thread).stop()
        if self._executor is not None:
            self._executor.shutdown(wait=False)

    def _find_belongings(self) -> list[object]:
        """Find what is of this loop and has a finalizer, such as an HTTP session, which would miss being closed."""
        referrers: list[Any] = gc.get_referrers(self)
        attributes: list[Any] = [referrer for referrer in referrers if isinstance(referrer, dict)]
        ids = {id(attribute) for attribute in attributes}
        owners: list[Any] = gc.get_referrers(*attributes)
        return [
            *filter(_has_finalizer, referrers),
            *(owner for owner in filter(_has_finalizer, owners) if id(getattr(owner, "__dict__", None)) in ids),
        ]

    # --- Steps of tasks -----------------------------------------------------------------------------------------------

    def create_task(self, coro: Any, **options: Any) -> asyncio.Task[Any]:
        """Create a task whose steps are known. A task factory is asked as ever."""
        return super().create_task(Steps(self, coro), **options)

    def enter_step(self, steps: Steps) -> None:
        """Begin a step."""
        self.steps.add(steps)
        self._depth += 1

    def leave_step(self, steps: Steps, *, has_ended: bool) -> None:
        """End a step. One within another, of a task that starts eagerly, ends with the outer one."""
        self._depth -= 1
        if has_ended:
            self.steps.discard(steps)
        if self._depth:
            return
        self.watch_time()
        if self._afterwards_steps is not None:
            self._afterwards_steps -= 1
            if not self._afterwards_steps:
                self.stop()
        self.on_step(steps, has_ended)

    def watch_time(self) -> None:
        """Take note that the loop goes on; raise `TooLong` if it has gone on for too long, or was given up."""
        self._seen_at = time.monotonic()
        if self._is_given_up or self._seen_at > self._ends_at:
            raise TooLong

    async def sock_connect(self, sock: socket.socket, address: Any) -> None:
        """Connect; remember what breaks when the process vanishes."""
        self._sockets.add(sock)
        await super().sock_connect(sock, address)

    # --- Time ---------------------------------------------------------------------------------------------------------

    def time(self) -> float:
        """Return the time, by a clock that jumps."""
        return time.monotonic() + self._jumped_seconds

    def call_at(
        self,
        when: float,
        callback: Callable[[Unpack[Ts]], object],
        *args: *Ts,
        context: Context | None = None,
    ) -> asyncio.TimerHandle:
        """Set a timer; remember who sleeps."""
        timer = super().call_at(when, callback, *args, context=context)
        if callback is _WAKE_SLEEPER:
            self._sleeps.append(timer)
        return timer

    def idle(self, seconds: float | None, *, has_sockets: bool) -> float:
        """Decide what to do while there is nothing to do until a timer is due; return for how long to wait.

        Args:
            seconds: Until the next timer; None: there is none.
            has_sockets: Whether it waits for any.
        """
        self.watch_time()
        depends_on_others = self._pending_operations > 0 or self._busy_threads() > 0 or self.has_messages
        if not (depends_on_others or has_sockets):
            now = self.time()
            self._sleeps = [timer for timer in self._sleeps if not timer.cancelled() and timer.when() > now]
            if self._sleeps and seconds is not None:
                self._jumped_seconds += seconds
                return 0
        if self._afterwards_steps is not None and not depends_on_others:
            self.stop()
            return 0
        remaining = max(0.0, self._ends_at - time.monotonic()) + 0.001
        longest = min(remaining, self._timeout_seconds / 4)  # then it says that it is not blocked, but waits
        return longest if seconds is None else min(seconds, longest)

    @property
    def uses_threads(self) -> bool:
        """Whether threads have sent any."""
        return bool(self._helpers)

    @property
    def has_messages(self) -> bool:
        """Whether threads have sent any that it has not looked at."""
        return self._messages > 0

    # --- Threads ------------------------------------------------------------------------------------------------------

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[Unpack[Ts]], T], *args: *Ts
    ) -> asyncio.Future[T]:
        """Run a function in a thread; know when it has ended."""
        if executor is None:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(thread_name_prefix="crash_everywhere")
                self.set_default_executor(self._executor)
        elif not isinstance(executor, ThreadPoolExecutor):
            return super().run_in_executor(executor, func, *args)  # what a subprocess does is its own affair
        with self._threads:
            self._jobs += 1

        def job() -> T:
            try:
                return func(*args)
            finally:
                with self._threads:
                    self._jobs -= 1
                    self._threads.notify_all()

        return super().run_in_executor(executor, job)

    def call_soon_threadsafe(
        self, callback: Callable[[Unpack[Ts]], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Take a message of a thread; what has vanished hears none."""
        with self._threads:
            if self._has_vanished:
                return asyncio.Handle(callback, args, self, context)
            self._messages += 1
            self._helpers.add(threading.current_thread())
            self._threads.notify_all()
            return super().call_soon_threadsafe(self._hear, callback, args, context=context)

    def _hear(self, callback: Callable[..., object], args: tuple[Any, ...]) -> None:
        with self._threads:
            self._messages -= 1
        callback(*args)

    def is_closed(self) -> bool:
        """Whether it is closed or has vanished."""
        return self._has_vanished or super().is_closed()

    def wait_for_threads(self) -> None:
        """Wait until the threads have ended that the loop waits for; not for long, since they may wait for the loop."""
        with self._threads:
            self._threads.wait_for(lambda: not self._busy_threads(), timeout=PATIENCE_SECONDS)

    def _busy_threads(self) -> int:
        """Count the threads that the loop waits for: of executors, and of libraries, which say when they are done."""
        innermost = [frame for steps in self.steps for frame in list(frames_of(steps.coroutine))[-1:]]
        waiting: int = sum(
            frame.f_code.co_name == "run_sync_in_worker_thread"  # of anyio.to_thread
            or frame.f_globals.get("__name__") == "aiosqlite.core"
            for frame in innermost
        )
        return self._jobs + max(0, waiting - self._messages)


def _has_finalizer(thing: object) -> bool:
    return hasattr(type(thing), "__del__")


class _Selector(selectors.DefaultSelector):
    def __init__(self, loop: ProcessLoop) -> None:
        super().__init__()
        self._loop = loop
        self._watched = self.get_map()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        has_sockets = len(self._watched) > 1  # besides the pipe that wakes the loop
        self._loop.uses_sockets |= has_sockets
        ready = super().select(0) if has_sockets or self._loop.has_messages else []
        if ready or (timeout is not None and timeout <= 0):
            return ready
        seconds = self._loop.idle(timeout, has_sockets=has_sockets)
        return super().select(seconds) if seconds else []


class Steps(Coroutine[Any, Any, Any]):
    """What a task runs: a coroutine whose steps the loop learns of. In all else it is the coroutine."""

    __slots__ = ("_loop", "coroutine")

    def __init__(self, loop: ProcessLoop, coroutine: Any) -> None:
        self._loop = loop
        self.coroutine = coroutine

    def send(self, value: Any) -> Any:
        """Take the next step."""
        return self._step(self.coroutine.send, value)

    def throw(self, *error: Any) -> Any:
        """Take the next step, with an exception."""
        return self._step(self.coroutine.throw, *error)

    def _step(self, resume: Callable[..., Any], *args: Any) -> Any:
        self._loop.enter_step(self)
        try:
            waits_for = resume(*args)
        except BaseException:
            self._loop.leave_step(self, has_ended=True)
            raise
        self._loop.leave_step(self, has_ended=False)
        return waits_for

    def close(self) -> None:
        """Close the coroutine."""
        self.coroutine.close()

    def __await__(self) -> Any:
        return self.coroutine.__await__()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.coroutine, name)


def new_awaitable(call: Call) -> Awaitable[object]:
    """Call, and return what is to be awaited.

    Raises:
        IdempotencyUsageError: It cannot be.
    """
    try:
        awaitable = call()
    except Exception as error:
        raise misuse(
            f"call() raised {type(error).__qualname__} before it returned something to await. It must start an async "
            "function: asyncio.run, aidem.sync and other blocking calls cannot run on an event loop. For a handler "
            "made by lambda_handler, use `lambda: handler.__wrapped__(event, context)`"
        ) from error
    if not isinstance(cast("object", awaitable), Awaitable):
        raise misuse(
            f"call() must return something to await, not {type(awaitable).__qualname__}; "
            "write `lambda: handler(event, context)` with an async handler"
        )
    if asyncio.isfuture(awaitable) and awaitable.get_loop() is not asyncio.get_running_loop():
        raise misuse(
            "call() returned a task or future of another event loop; each run has a loop of its own, so write "
            "`lambda: charge(order)`, which makes a new coroutine each time"
        )
    if inspect.iscoroutine(awaitable) and inspect.getcoroutinestate(awaitable) != inspect.CORO_CREATED:
        raise misuse("call() returned a coroutine that was awaited before; make a new one: `lambda: charge(order)`")
    return awaitable


def _nothing(*_: object) -> None:
    pass


def misuse(message: str) -> IdempotencyUsageError:
    """Return the error about a wrong use of `crash_everywhere`."""
    return IdempotencyUsageError(f"crash_everywhere: {message}")
