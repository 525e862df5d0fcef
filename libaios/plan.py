"""One description of a call, and two ways to make it: as a function (`libaios`) or as a coroutine (`libaios.aio`).

For each call a family file (`proc`, `msg`, `llm`, …) has a function that checks the arguments and returns a `Plan`.
`@syscall` turns this into a function that makes the call, and `aio.twin` makes the coroutine from the same plan.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Generator, Iterator
from typing import Any, Generic, ParamSpec, TypeVar

from msgspec import Struct

from libaios.agent import connection
from libaios.connection import Pending
from libaios.wire import TABLE

P = ParamSpec("P")
T = TypeVar("T")


class Plan(Struct, Generic[T]):
    """A system call that has not been made yet: its number, its arguments, and the function that converts the body of
    the reply into the result for the caller. `timeout` in seconds limits the wait for the reply; the kernel's own limit
    comes first."""

    sys: int
    args: Any
    convert: Callable[[Any], T] | None = None
    timeout: float | None = None

    @property
    def body(self) -> Any:
        """The type of the reply's body."""
        return TABLE[self.sys].reply

    def finish(self, body: Any) -> T:
        return self.convert(body) if self.convert is not None else body


def run(plan: Plan[T]) -> T:
    call = connection().call
    return call(plan.sys, plan.args, plan.body, timeout=plan.timeout, convert=plan.convert)  # type: ignore[no-any-return]


def syscall(plan: Callable[P, Plan[T]]) -> Callable[P, T]:
    """The function that makes the planned call and waits for it."""

    @functools.wraps(plan)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        return run(plan(*args, **kwargs))

    return make


AT_ONCE = 4  # calls of a window that are under way: each may hold a megabyte in three processes


class Window(Struct):
    """Calls that do not wait for each other: up to AT_ONCE of them are open at the same time. `take` gets each result,
    in the order of the plans. When one fails, the open ones are abandoned."""

    plans: Iterator[Plan[Any]]
    take: Callable[[Any], Any]


#: Several calls as one: yields plans, gets their results (None for a window), and returns the whole result.
Steps = Generator[Plan[Any] | Window, Any, T]


def run_window(window: Window) -> None:
    conn = connection()
    under_way: deque[tuple[Plan[Any], Pending]] = deque()

    def take() -> None:
        plan, call = under_way[0]
        result = plan.finish(conn.result(call, plan.body, timeout=plan.timeout))
        under_way.popleft()
        window.take(result)

    try:
        for plan in window.plans:
            if len(under_way) >= AT_ONCE:
                take()
            under_way.append((plan, conn.submit(plan.sys, plan.args)))
        while under_way:
            take()
    finally:
        for _, call in under_way:
            conn.abandon(call)


def run_all(steps: Steps[T]) -> T:
    try:
        plan = next(steps)
        while True:
            try:
                result = None
                if isinstance(plan, Window):
                    run_window(plan)
                else:
                    result = run(plan)
            except BaseException as err:  # into the generator, which decides what it means
                plan = steps.throw(err)
            else:
                plan = steps.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return] # what a generator returns has no type
    finally:
        steps.close()


def one_by_one(steps: Steps[T]) -> Generator[Plan[Any], Any, T]:
    """The same steps for a driver that makes one call at a time: the calls of a window one after the other."""
    advance: Callable[[Any], Plan[Any] | Window] = steps.send
    value: Any = None
    while True:
        try:
            plan = advance(value)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return] # what a generator returns has no type
        advance, value = steps.send, None
        try:
            if isinstance(plan, Window):
                for one in plan.plans:
                    plan.take((yield one))
            else:
                value = yield plan
        except BaseException as err:  # into the generator, which decides what it means
            advance, value = steps.throw, err


def syscalls(steps: Callable[P, Steps[T]]) -> Callable[P, T]:
    """The function that makes the calls of these steps, one after the other."""

    @functools.wraps(steps)
    def make(*args: P.args, **kwargs: P.kwargs) -> T:
        return run_all(steps(*args, **kwargs))

    return make


def plan_of(function: Callable[P, T]) -> Callable[P, Plan[T]]:
    """The plan behind a function made by `syscall`."""
    return function.__wrapped__  # type: ignore[attr-defined, no-any-return] # functools.wraps put it there


def steps_of(function: Callable[P, T]) -> Callable[P, Steps[T]]:
    """The steps behind a function made by `syscalls`."""
    return function.__wrapped__  # type: ignore[attr-defined, no-any-return] # functools.wraps put it there
