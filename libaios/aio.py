"""The same names as coroutines: `import libaios.aio as aios; r = await aios.llm.chat(…)`.

Calls go over the process's one connection, as those of threads do, and the event loop takes part in reading it. Nothing
here blocks the loop: not a full ring, and not the time in which there is no kernel. Cancelling a task cancels its call.
A stream is iterated with `async for piece in aios.llm.chat(…, stream=True)`.
"""

from __future__ import annotations

import asyncio
import errno
import inspect
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Generator, Mapping, Sequence
from typing import Any, ParamSpec, TypeVar

from msgspec.structs import replace

from libaios import context as _context
from libaios import llm as _llm
from libaios import mem as _mem
from libaios import msg as _msg
from libaios import proc as _proc
from libaios import sto as _sto
from libaios import tool as _tool
from libaios import wire
from libaios.agent import connected, connection
from libaios.channel import BACKSTOP_S, LONGEST_S
from libaios.connection import SLACK_S, Connection, Pending, decode_body
from libaios.generate import Piece, Pieces, Result, generate_args, variants
from libaios.loop import Finished, Think, observation, steps
from libaios.plan import AT_ONCE, Plan, Steps, Window, plan_of, steps_of
from libaios.wire import Sys

P = ParamSpec("P")
T = TypeVar("T")


async def _connection() -> Connection:
    """The process's connection. The first connect over the control socket waits for an answer, so a thread makes it."""
    existing = connected()
    return existing if existing is not None else await asyncio.to_thread(connection)


async def _run(plan: Plan[T]) -> T:
    conn = await _connection()
    call, replied = await _submit(conn, plan.sys, plan.args)
    await _final(conn, call, replied, plan.timeout)
    assert call.final is not None
    return plan.finish(decode_body(call.final, plan.body))


_turns: dict[asyncio.AbstractEventLoop, asyncio.Lock] = {}


def _turn(loop: asyncio.AbstractEventLoop) -> asyncio.Lock:
    """A lock that a task holds while it sends: so the tasks of a loop send in the order in which they called, also when
    the ring is full."""
    turn = _turns.get(loop)
    if turn is None:
        for known in list(_turns):
            if known.is_closed():
                _turns.pop(known, None)
        turn = _turns[loop] = asyncio.Lock()
    return turn


async def _submit(conn: Connection, sys: int, args: Any, stream: bool = False) -> tuple[Pending, Replied]:
    """Send a call; the event is set at every reply. While the ring is full the task waits, and the loop goes on."""
    loop = asyncio.get_running_loop()
    conn.attach_loop(loop)
    replied = Replied()

    def notify() -> None:
        loop.call_soon_threadsafe(replied.set)

    call = conn.prepare(sys, args, stream=stream, notify=notify)
    try:
        async with _turn(loop):
            while not conn.may_send(call):
                await _reply(conn, replied)
            conn.send(call)
    except BaseException:  # of any kind, an interrupt too: cancel the call, and raise it again
        conn.abandon(call)
        raise
    return call, replied


async def _final(conn: Connection, call: Pending, replied: Replied, timeout: float | None) -> None:
    try:
        async with asyncio.timeout(None if timeout is None else timeout + SLACK_S):
            while call.final is None:
                await _reply(conn, replied)
    except BaseException as err:  # of any kind, an interrupt too: cancel the call, and raise it again
        conn.abandon(call)
        if isinstance(err, TimeoutError):
            raise TimeoutError(errno.ETIMEDOUT, "no answer in time") from None
        raise


class Replied(asyncio.Event):
    """Set at each reply to a call. `backstop_s`: how long the next wait for a reply lasts at most, in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.backstop_s = BACKSTOP_S


async def _reply(conn: Connection, replied: Replied, deadline: float | None = None) -> None:
    """Wait for the next reply, until the deadline at most. When the back-stop passes without one, read the connection
    anyway, since the bell's byte may have been lost; the next back-stop is twice as long, as in `Channel.wait`."""
    seconds, replied.backstop_s = replied.backstop_s, BACKSTOP_S
    left = seconds if deadline is None else max(0.0, deadline - time.monotonic())
    try:
        async with asyncio.timeout(min(seconds, left)):
            await replied.wait()
    except TimeoutError:
        conn.pump()
        conn.nudge()
        replied.backstop_s = min(2 * seconds, LONGEST_S)
    replied.clear()


def twin(function: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The coroutine of a function made by `plan.syscall`."""
    plan = plan_of(function)

    async def make(*args: P.args, **kwargs: P.kwargs) -> T:
        return await _run(plan(*args, **kwargs))

    make.__name__ = make.__qualname__ = function.__name__
    make.__doc__ = function.__doc__
    return make


async def _run_window(window: Window) -> None:
    under_way: deque[asyncio.Task[Any]] = deque()
    try:
        for plan in window.plans:
            if len(under_way) >= AT_ONCE:
                window.take(await under_way.popleft())
            under_way.append(asyncio.create_task(_run(plan)))
        while under_way:
            window.take(await under_way.popleft())
    finally:
        for task in under_way:  # one has failed
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)


async def _run_all(steps: Steps[T]) -> T:
    try:
        plan = next(steps)
        while True:
            try:
                result = None
                if isinstance(plan, Window):
                    await _run_window(plan)
                else:
                    result = await _run(plan)
            except BaseException as err:  # into the generator, which decides what it means
                plan = steps.throw(err)
            else:
                plan = steps.send(result)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return] # what a generator returns has no type
    finally:
        steps.close()


def twin_of_steps(function: Callable[P, T]) -> Callable[P, Coroutine[Any, Any, T]]:
    """The coroutine of a function made by `plan.syscalls`."""
    steps = steps_of(function)

    async def make(*args: P.args, **kwargs: P.kwargs) -> T:
        return await _run_all(steps(*args, **kwargs))

    make.__name__ = make.__qualname__ = function.__name__
    make.__doc__ = function.__doc__
    return make


class Generation(Coroutine[Any, Any, Any]):
    """What `chat` and `complete` return. `await` it for a `Result`, directly or as a task; each `await` gives the same
    one. A stream is iterated with `async for`; within `async with` it ends when that is left."""

    def __init__(self, args: wire.Generate, n: Any = 1, tools: Sequence[Any] = ()) -> None:
        self._args = args
        self._tools = tools  # with names of the toolbox among them; () otherwise
        self._variants = variants(args, n)
        self._task: asyncio.Task[Any] | None = None
        self._turns: Generator[Any, None, Any] | None = None  # while a task drives this as a coroutine
        self._pieces: AsyncGenerator[Piece, None] | None = None

    def __await__(self) -> Generator[Any, None, Any]:
        if self._task is None:
            self._task = asyncio.create_task(self._result())
        return self._task.__await__()

    def send(self, value: Any) -> Any:
        return self._drive(lambda turns: turns.send(value))

    def throw(self, *error: Any) -> Any:
        return self._drive(lambda turns: turns.throw(*error))

    def close(self) -> None:
        self._turns = None

    def _drive(self, step: Callable[[Generator[Any, None, Any]], Any]) -> Any:
        self._turns = self._turns or self.__await__()
        try:
            return step(self._turns)
        except BaseException:  # whatever ended it
            self._turns = None  # it is over; `_task` has the result
            raise

    async def __aenter__(self) -> AsyncGenerator[Piece, None]:
        self._pieces = self.__aiter__()
        return self._pieces

    async def __aexit__(self, *exc: object) -> None:
        if self._pieces is not None:
            await self._pieces.aclose()

    async def _resolve(self) -> None:
        """Put the tools in the place of their names."""
        if self._tools:
            tools, self._tools = await _resolved(self._tools), ()
            self._args = replace(self._args, tools=tools)
            self._variants = [replace(args, tools=tools) for args in self._variants]

    async def _result(self) -> Result | AsyncIterator[Piece]:
        if self._args.stream:
            return self.__aiter__()
        await self._resolve()
        plans: list[Plan[wire.Generated]] = [Plan(Sys.GENERATE, args, None, args.timeout_s) for args in self._variants]
        if len(plans) == 1:
            return Result(await _run(plans[0]))
        tasks = [asyncio.create_task(_run(plan)) for plan in plans]
        try:
            return Result.of(await asyncio.gather(*tasks))
        except BaseException:  # of any kind: no task of it may run on
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def __aiter__(self) -> AsyncGenerator[Piece, None]:
        await self._resolve()
        conn = await _connection()
        call, replied = await _submit(conn, Sys.GENERATE, self._args, stream=True)
        timeout = self._args.timeout_s
        deadline = None if timeout is None else time.monotonic() + timeout + SLACK_S
        pieces = Pieces()
        try:
            while call.pieces or call.final is None:
                if call.pieces:
                    piece = call.pieces.popleft()
                    yield pieces.piece(piece)
                elif deadline is not None and time.monotonic() > deadline:
                    raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
                else:
                    await _reply(conn, replied, deadline)
            yield pieces.piece(decode_body(call.final, wire.Generated))
        finally:
            conn.abandon(call)


async def _resolved(tools: Sequence[Any]) -> list[dict[str, Any]]:
    """The tools of a chat with all names replaced."""
    there = {info.name: info for info in await tool.list()}
    return _tool.resolved(tools, _tool.chosen(there, _tool.names_in(tools)))


async def _local(functions: Mapping[str, Callable[..., Any]], call: wire.ToolCall) -> str:
    """Call a function of the agent itself, which may be a coroutine function."""
    try:
        result = functions[call.name](**call.arguments)
        return _tool.result_text(await result if inspect.isawaitable(result) else result)
    except Exception as err:  # the model gets the error of the function, and decides what to do
        return f"error: {type(err).__name__}: {err}"


async def _called(call: wire.ToolCall) -> str:
    """The result of a tool's call as the model gets it."""
    try:
        return _tool.result_text(await tool.call(call.name, call.arguments))
    except OSError as err:
        return observation(err)


class Context(_context.Conversation):
    """`libaios.context.Context` for coroutines."""

    async def chat(self, more: str | Sequence[Mapping[str, Any]] = (), **options: Any) -> Result:
        """As `Context.chat`, without streams: `stream=True` raises OSError EINVAL."""
        if options.pop("stream", False):
            raise wire.error(
                errno.EINVAL, "stream: not here; libaios.aio.llm.chat(context.messages, stream=True) streams"
            )
        messages = self._with(more)
        n = options.pop("n", 1)
        result: Result = await Generation(generate_args(messages, None, **self._options(options)), n)
        self._keep(messages, result.text, result.tool_calls, result.reasoning)
        return result

    def fork(self) -> Context:
        """As `Context.fork`."""
        return Context(self.messages, tools=self.tools, model=self.model, lora=self.lora)

    async def save(self, name: str) -> wire.SavedContext:
        """As `Context.save`."""
        return await _run(self._save(name))

    async def close(self) -> None:
        """As `Context.close`."""
        if self.messages:
            await _run(self._close())


class llm:
    """`libaios.llm` for coroutines."""

    embed = staticmethod(twin(_llm.embed))
    rerank = staticmethod(twin(_llm.rerank))
    tokenize = staticmethod(twin(_llm.tokenize))
    detokenize = staticmethod(twin(_llm.detokenize))
    models = staticmethod(twin(_llm.models))

    @staticmethod
    def chat(messages: Sequence[Mapping[str, Any]], **options: Any) -> Generation:
        """As `libaios.llm.chat`."""
        n = options.pop("n", 1)
        named = options.pop("tools") if _tool.names_in(options.get("tools")) else ()
        return Generation(generate_args(messages, None, **options), n, named)

    @staticmethod
    async def run(
        messages: str | Sequence[Mapping[str, Any]],
        tools: Sequence[str | Mapping[str, Any]] = (),
        *,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        max_steps: int = 16,
        **options: Any,
    ) -> Finished:
        """As `libaios.llm.run`. A function may be a coroutine function."""
        own = functions or {}
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        offered = await _resolved(tools) if _tool.names_in(tools) else tools
        loop = steps(asked, max_steps)
        try:
            step = next(loop)
            while True:
                if isinstance(step, Think):
                    step = loop.send(await llm.chat(step.messages, tools=offered or None, **options))
                else:
                    step = loop.send(await _local(own, step) if step.name in own else await _called(step))
        except StopIteration as end:
            finished: Finished = end.value
            return finished

    saved = staticmethod(twin(_context.saved))
    forget = staticmethod(twin(_context.forget))

    @staticmethod
    def context(messages: Sequence[Mapping[str, Any]] = (), **options: Any) -> Context:
        """As `libaios.llm.context`; its `chat`, `save` and `close` are to be awaited."""
        return Context(messages, **options)

    @staticmethod
    async def restore(name: str, model: str | None = None) -> Context:
        """As `libaios.llm.restore`."""
        found = await _run(_context.restored(name, model))
        return Context(found.messages, model=model, lora=found.lora or None)

    @staticmethod
    def complete(prompt: str | Sequence[int], **options: Any) -> Generation:
        """As `libaios.llm.complete`."""
        n = options.pop("n", 1)
        return Generation(generate_args(None, prompt, **options), n)


class proc:
    """`libaios.proc` for coroutines."""

    getpid = staticmethod(twin(_proc.getpid))
    getppid = staticmethod(twin(_proc.getppid))
    spawn = staticmethod(twin(_proc.spawn))
    wait = staticmethod(twin(_proc.wait))
    kill = staticmethod(twin(_proc.kill))
    ps = staticmethod(twin(_proc.ps))
    nice = staticmethod(twin(_proc.nice))


class msg:
    """`libaios.msg` for coroutines."""

    send = staticmethod(twin(_msg.send))
    recv = staticmethod(twin(_msg.recv))


class mem:
    """`libaios.mem` for coroutines."""

    add = staticmethod(twin(_mem.add))
    get = staticmethod(twin(_mem.get))
    update = staticmethod(twin(_mem.update))
    remove = staticmethod(twin(_mem.remove))
    search = staticmethod(twin(_mem.search))
    list = staticmethod(twin(_mem.list))
    clear = staticmethod(twin(_mem.clear))
    stats = staticmethod(twin(_mem.stats))


class sto:
    """`libaios.sto` for coroutines."""

    write = staticmethod(twin_of_steps(_sto.write))
    append = staticmethod(twin_of_steps(_sto.append))
    upload = staticmethod(twin_of_steps(_sto.upload))
    read = staticmethod(twin_of_steps(_sto.read))
    download = staticmethod(twin_of_steps(_sto.download))
    diff = staticmethod(twin_of_steps(_sto.diff))
    list = staticmethod(twin_of_steps(_sto.list))
    stat = staticmethod(twin(_sto.stat))
    history = staticmethod(twin(_sto.history))
    rollback = staticmethod(twin(_sto.rollback))
    remove = staticmethod(twin(_sto.remove))
    trash = staticmethod(twin(_sto.trash))
    restore = staticmethod(twin(_sto.restore))
    empty_trash = staticmethod(twin_of_steps(_sto.empty_trash))
    share = staticmethod(twin(_sto.share))
    unshare = staticmethod(twin(_sto.unshare))
    shares = staticmethod(twin(_sto.shares))
    mount = staticmethod(twin(_sto.mount))
    unmount = staticmethod(twin(_sto.unmount))
    mounts = staticmethod(twin(_sto.mounts))
    search = staticmethod(twin(_sto.search))
    stats = staticmethod(twin(_sto.stats))


class tool:
    """`libaios.tool` for coroutines."""

    list = staticmethod(twin(_tool.list))
    call = staticmethod(twin_of_steps(_tool.call))
    define = staticmethod(_tool.define)

    @staticmethod
    async def schema(name: str) -> dict[str, Any]:
        """As `libaios.tool.schema`."""
        there = {info.name: info for info in await tool.list()}
        return _tool.chosen(there, [name])[0].parameters

    @staticmethod
    async def stream(
        name: str, arguments: Mapping[str, Any] | None = None, /, **more: Any
    ) -> AsyncGenerator[str, None]:
        """As `libaios.tool.stream`, with `async for`."""
        conn = await _connection()
        args = replace(_tool.call_args(name, arguments, more, None), stream=True)
        call, replied = await _submit(conn, Sys.TOOL_CALL, args)
        wrote = False
        try:
            while call.pieces or call.final is None:
                if call.pieces:
                    wrote = True
                    yield call.pieces.popleft()
                else:
                    await _reply(conn, replied)
            result = decode_body(call.final, Any)
            if isinstance(result, str) and not wrote:
                yield result
        finally:
            conn.abandon(call)
