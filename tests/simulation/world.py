"""One seeded world in one thread: virtual time, shuffled callbacks, threads that are greenlets, and machines that can lose their power.

Law: import this before anything of the product. It puts a dispatcher in the place of each way to the outside that the standard library has
(time, randomness, threads, queues); without a world they do what they always did. A machine is a context variable: whatever a task, timer
or connection of a machine starts inherits it, so nothing in the product knows on which machine it runs. A machine without power is never
resumed: none of its ``finally`` runs, as in life.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import heapq
import itertools
import os
import queue
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import greenlet

epoch = 1_760_000_000.0  # what the clocks of a world show at its beginning
ends_after_s = 600.0
real = SimpleNamespace(
    time=time.time,
    monotonic=time.monotonic,
    perf_counter=time.perf_counter,
    urandom=os.urandom,
    thread=threading.Thread,
    queue=queue.SimpleQueue,
    result=concurrent.futures.Future.result,
    as_completed=asyncio.as_completed,
)


class PowerCut(BaseException):
    """The machine that ran this has no power any more."""


class Standstill(Exception):
    """Nothing is left that could happen, or something goes on for ever."""


class Machine:
    """One run of a machine, from its start to its end. ``host`` outlives it: it has the address, the disk and the clock."""

    def __init__(self, host: Any, number: int) -> None:
        self.host = host
        self.number = number
        self.alive = True
        self.on_signal: Callable[[], Any] | None = None

    def context(self) -> contextvars.Context:
        """A fresh context on this machine."""
        made = contextvars.Context()
        made.run(here.set, self)
        return made


here: contextvars.ContextVar[Machine | None] = contextvars.ContextVar("here", default=None)
world: World | None = None


class _Task(asyncio.Task):  # type: ignore[type-arg]
    """Known by a number and not by its place in memory, so that sets of tasks have the same order in every run."""

    def __init__(self, *args: Any, **keywords: Any) -> None:
        self._number = _next_number()
        super().__init__(*args, **keywords)

    def __hash__(self) -> int:
        return self._number


class _Future(asyncio.Future):  # type: ignore[type-arg]
    def __init__(self, loop: Loop) -> None:
        self._number = _next_number()
        super().__init__(loop=loop)

    def __hash__(self) -> int:
        return self._number


_next_number = itertools.count().__next__


class Loop(asyncio.BaseEventLoop):
    """Jumps from one moment to the next at which something happens, and lets what is ready happen in an order of the seed."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        self._ready: list[asyncio.Handle] = []  # type: ignore[assignment]
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._order = random.Random()
        self._by_machine = True
        self.steps = 0
        self.trace = 0
        self.hub = greenlet.getcurrent()
        self._kept: list[object] = []  # to collect what never goes on would run its ``finally``
        self.set_task_factory(self._task)
        self.set_exception_handler(self._failed)
        self.failures: list[str] = []

    def become(self, seed: int) -> None:
        """Go on in this seed's order."""
        self._order.seed(f"order {seed}")
        self._by_machine = self._order.random() < 0.5  # half of the seeds keep each machine's own order, as asyncio promises

    # -- as asyncio's

    def time(self) -> float:
        return self._now

    def _task(self, loop: asyncio.AbstractEventLoop, coro: Any, **keywords: Any) -> _Task:
        task = _Task(coro, loop=loop, **keywords)
        self._kept.append(task)
        return task

    def create_future(self) -> _Future:
        return _Future(self)

    def call_soon(self, callback: Any, *args: Any, context: contextvars.Context | None = None) -> asyncio.Handle:  # type: ignore[override]
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(  # type: ignore[override]
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        timer = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, _next_number(), timer))
        return timer

    def _process_events(self, events: object) -> None: ...
    def _write_to_self(self) -> None: ...

    def add_signal_handler(self, number: int, callback: Callable[..., Any], *args: Any) -> None:
        machine = here.get()
        assert machine is not None
        machine.on_signal = callback

    def _run_once(self) -> None:
        while not self._stopping:  # type: ignore[attr-defined]
            self._run_next()

    def _run_next(self) -> None:
        timers, ready = self._timers, self._ready
        if not ready:
            while timers and timers[0][2]._cancelled:  # type: ignore[attr-defined]
                heapq.heappop(timers)
            if not timers or max(self._now, timers[0][0]) > ends_after_s:
                raise Standstill
            self._now = max(self._now, timers[0][0])
        while timers and timers[0][0] <= self._now:
            ready.append(heapq.heappop(timers)[2])
        handle: Any = self._choose()
        machine = handle._context.get(here)
        if machine is not None and not machine.alive:
            self._kept.append(handle)
        elif not handle._cancelled:
            self.steps += 1
            self.trace = hash((self.trace, self._now, machine.number if machine else -1))
            handle._run()

    def _choose(self) -> asyncio.Handle:
        ready: list[Any] = self._ready
        if len(ready) == 1:
            return ready.pop()  # type: ignore[no-any-return]
        chosen = int(self._order.random() * len(ready))
        if self._by_machine:
            machine = ready[chosen]._context.get(here)
            chosen = next(at for at, handle in enumerate(ready) if handle._context.get(here) is machine)
        return ready.pop(chosen)  # type: ignore[no-any-return]

    def note(self, *values: float) -> None:
        """Make these part of what must be the same in every run of the seed."""
        self.trace = hash((self.trace, self._now, *values))

    def _failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, PowerCut):
            self.failures.append(f"{context.get('message')}: {error!r}")

    # -- threads

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> Any:
        future = self.create_future()

        def work() -> None:
            try:
                result = func(*args)
            except PowerCut:
                return
            except BaseException as error:
                if not future.done():
                    future.set_exception(error)
            else:
                if not future.done():
                    future.set_result(result)

        self.call_soon(self.begin, work)
        return future

    def begin(self, work: Callable[[], None]) -> None:
        """Let blocking work begin, as a thread would."""
        thread = greenlet.greenlet(work, self.hub)
        self._kept.append(thread)
        thread.gr_context = contextvars.copy_context()
        thread.switch()

    def park(self, arm: Callable[[Callable[[], None]], None], timeout_s: float | None = None) -> None:
        """Block the thread that calls, until ``arm``'s argument is called or the time is over."""
        me = greenlet.getcurrent()
        if me is self.hub:
            raise AssertionError("the event loop must not block")
        woken = False

        def wake() -> None:
            nonlocal woken
            if not woken:
                woken = True
                me.switch()

        arm(wake)
        timer = self.call_later(timeout_s, wake) if timeout_s is not None else None
        self.hub.switch()
        if timer is not None:
            timer.cancel()


class Thread:
    """A ``threading.Thread`` in a world."""

    def __init__(self, *, target: Callable[[], None], name: str = "", daemon: bool = False) -> None:
        self._target = target
        self.ended = False
        self.wake: Callable[[], None] | None = None

    def start(self) -> None:
        _loop().call_soon(_loop().begin, self._run)

    def _run(self) -> None:
        greenlet.getcurrent().thread = self
        try:
            self._target()
        except PowerCut:
            pass
        finally:
            self.ended = True

    def join(self) -> None:
        while not self.ended:
            if greenlet.getcurrent() is not _loop().hub or self.wake is None:
                raise AssertionError("joins a thread that does not end")
            self.wake()


class Queue:
    """A ``queue.SimpleQueue`` in a world."""

    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._wake: Callable[[], None] | None = None

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._wake is not None:
            wake, self._wake = self._wake, None
            _loop().call_soon(wake)

    def get(self) -> Any:
        while not self._items:
            thread = getattr(greenlet.getcurrent(), "thread", None)

            def arm(wake: Callable[[], None], thread: Any = thread) -> None:
                self._wake = wake
                if thread is not None:
                    thread.wake = wake

            _loop().park(arm)
        return self._items.popleft()

    def get_nowait(self) -> Any:
        if not self._items:
            raise queue.Empty
        return self._items.popleft()


def _loop() -> Loop:
    assert world is not None
    return world.loop


def _result(self: concurrent.futures.Future[Any], timeout: float | None = None) -> Any:
    if world is not None and not self.done():
        _loop().park(lambda wake: self.add_done_callback(lambda _: _loop().call_soon(wake)), timeout)
    return real.result(self, timeout)


def _now() -> float:
    if world is None:
        return float(real.time())
    machine = here.get()
    return epoch + world.loop.time() + (machine.host.skew_s if machine is not None else 0.0)


class World:
    """What a seed decides. ``rng`` is for whoever makes things happen; the product draws from another one."""

    def __init__(self) -> None:
        global world
        self.rng = random.Random()
        self.bytes = random.Random()
        world = self
        self.loop = Loop()
        self.machines = 0
        self.become(-1)

    def become(self, seed: int) -> None:
        """Let this seed decide from now on."""
        self.seed = seed
        self.rng.seed(f"world {seed}")
        self.bytes.seed(f"bytes {seed}")
        random.seed(f"product {seed}")
        self.loop.become(seed)

    def machine(self, host: Any) -> Machine:
        """A machine that has just got power."""
        self.machines += 1
        return Machine(host, self.machines)


def _as_completed(work: Any, *, timeout: float | None = None) -> Any:
    """With tasks, whose order in a set is known, in the place of coroutines."""
    return real.as_completed([asyncio.ensure_future(each) for each in work], timeout=timeout)


time.time = _now
time.monotonic = lambda: world.loop.time() if world is not None else real.monotonic()
time.perf_counter = lambda: world.loop.time() if world is not None else real.perf_counter()
os.urandom = lambda size: world.bytes.randbytes(size) if world is not None else real.urandom(size)
threading.Thread = lambda *a, **k: Thread(**k) if world is not None else real.thread(*a, **k)  # type: ignore[misc,assignment]
queue.SimpleQueue = lambda: Queue() if world is not None else real.queue()  # type: ignore[misc,assignment]
asyncio.as_completed = _as_completed
concurrent.futures.Future.result = _result  # type: ignore[method-assign]
