"""Views of a group: some of its ranks with some call options. Immutable, cheap, the same verbs.

ManyView  its calls give a list, in the view's order        group, group[2:6], group[[0, 4]]
OneView   its calls give the bare value                     group[0], options(reply_from=0)

It is long because each verb's type is written out for either view: typing has no shorter way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from rankwise._answers import explain, flush_timeout, take
from rankwise._calls import Call
from rankwise._checks import one_a_rank, wrong_type
from rankwise._deadline import EXPLAIN_PAUSE, check_timeout
from rankwise._future import GroupFuture
from rankwise._methods import resolve_method
from rankwise._options import KEEP, Options, check_reply_from, pick
from rankwise.wire.codec import encode_call

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rankwise._engine import Engine
    from rankwise._seat import Seat

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class View:
    """What every view has. `_bare`: the rank whose bare value is the result; None: a list."""

    _seat: Seat
    _ranks: tuple[int, ...]
    _group: object
    _options: Options
    _bare: int | None

    def _init_view(
        self,
        seat: Seat,
        ranks: tuple[int, ...],
        group: object,
        bare: int | None,
        options: Options,
    ) -> None:
        self._seat = seat  # where the engine is found: another one after a restart
        self._ranks = ranks
        self._group = group  # a view keeps its group alive
        self._bare = bare
        self._options = options

    @property
    def _engine(self) -> Engine:
        return self._seat.engine

    def __len__(self) -> int:
        return len(self._ranks)

    def __repr__(self) -> str:
        return f"<view of {self._engine.name!r}: ranks {list(self._ranks)}>"

    def __reduce__(self) -> Any:
        raise TypeError("a view of a WorkerGroup cannot be pickled: it belongs to its process")

    # -- making calls -------------------------------------------------------------------------

    def _make(
        self, engine: Engine, method: object, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        name, sent = resolve_method(method)
        return self._make_call(name, encode_call(sent, args, kwargs, engine.arena, self._ranks))

    def _make_call(self, name: str, body: bytes, bodies: dict[int, bytes] | None = None) -> Call:
        options = self._options
        ranks = self._ranks
        return Call(  # by position: by name it takes 0.5 us longer
            name,
            body,
            ranks,
            self._bare,
            bodies,
            None if options.timeout is None else self._engine.deadline(options.timeout),
            options.reply_from,
            options.return_exceptions,
            options.on_error or ("fail" if len(ranks) > 1 else "continue"),
            options.grace,
            options.timeout,
            None if options.slow_after is None else options.slow(),
        )

    def _run(self, engine: Engine, call: Call) -> Any:
        refusal = engine.run(call)
        if refusal is not None:
            raise explain(refusal, None, engine)
        return take(call, engine)

    def _submit(self, engine: Engine, call: Call) -> GroupFuture[Any]:
        # Not `GroupFuture[Any](...)`, which makes an alias, and notes it in each of them: 0.2 us.
        future: GroupFuture[Any] = GroupFuture(call, engine, self._group)
        refusal = engine.submit((call,))
        if refusal is not None:
            future._fetched = True
            raise explain(refusal, None, engine)
        return future

    def _scatter(
        self,
        engine: Engine,
        method: object,
        parts: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Call:
        name, sent = resolve_method(method)
        if isinstance(parts, (str, bytes, dict, set, frozenset)) or not hasattr(parts, "__len__"):
            raise wrong_type("parts", "a sequence with one item a rank", parts)
        one_a_rank("parts", parts, len(self._ranks))
        arena = engine.arena
        bodies = {
            rank: encode_call(sent, (part, *args), kwargs, arena, (rank,))
            for rank, part in zip(self._ranks, parts, strict=True)
        }
        return self._make_call(name, b"", bodies)

    @overload
    def submit_each(
        self, method: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[GroupFuture[R]]: ...
    @overload
    def submit_each(self, method: str, /, *args: Any, **kwargs: Any) -> list[GroupFuture[Any]]: ...
    def submit_each(self, method: object, /, *args: Any, **kwargs: Any) -> list[GroupFuture[Any]]:
        """Like `submit`, but one future a rank, in the view's order, settled each by its own rank.

        Each has `.rank`. A rank that fails leaves the others alone (`on_error` is "continue").
        """
        name, sent = resolve_method(method)
        engine = self._seat.engine
        body = encode_call(sent, args, kwargs, engine.arena, self._ranks)
        options = self._options
        until = engine.deadline(options.timeout)
        slow = options.slow()
        calls = tuple(
            Call(
                name,
                body,
                (rank,),
                shape=rank,
                deadline=until,
                return_exceptions=options.return_exceptions,
                on_error=options.on_error or "continue",
                grace=options.grace,
                timeout=options.timeout,
                slow=slow,
            )
            for rank in self._ranks
        )
        futures: list[GroupFuture[Any]] = [GroupFuture(call, engine, self._group) for call in calls]
        refusal = engine.submit(calls)
        if refusal is not None:
            for future in futures:
                future._fetched = True
            raise explain(refusal, None, engine)
        return futures

    def flush(self, timeout: float | None = None) -> None:
        """Wait until every call of the group that was submitted before has ended.

        Raises nothing of theirs; CallTimeout where `timeout` seconds were not enough: with what
        each rank is doing that owes an answer, and its stack (no stacks where `timeout` is 0: that
        is a look, which interrupts nobody).
        """
        engine = self._seat.engine
        until = engine.deadline(check_timeout(timeout))
        call = Call("flush", b"", ())
        engine.barrier(call)
        if engine.wait(call, until):
            return
        seconds = max(0.0, timeout or 0.0)
        owed = {rank: other for rank, other in engine.owed().items() if other.id <= call.id}
        reports = engine.inquire(tuple(owed), EXPLAIN_PAUSE, lately=True) if seconds else None
        if not call.done:
            raise flush_timeout(engine, seconds, owed, reports)

    def collective_rpc(
        self,
        method: Callable[..., Any] | str,
        timeout: float | None = None,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        non_block: bool = False,
        unique_reply_rank: int | None = None,
    ) -> Any:
        """vLLM's verb: a list of results, or the bare value of `unique_reply_rank`; with
        `non_block` a future of it. A callable `method` takes the worker first."""
        if isinstance(args, (str, bytes)) or not isinstance(args, Sequence):
            raise wrong_type("args", "a tuple or list, args=(x,)", args)
        if kwargs is not None and not isinstance(kwargs, Mapping):
            raise wrong_type("kwargs", "a mapping or None", kwargs)
        rank = check_reply_from(unique_reply_rank, self._ranks, "unique_reply_rank")
        view = self.options(timeout=timeout, reply_from=rank)
        engine = self._seat.engine
        call = view._make(engine, method, tuple(args), dict(kwargs or {}))
        return view._submit(engine, call) if non_block else view._run(engine, call)

    # -- other views --------------------------------------------------------------------------

    def options(
        self,
        timeout: float | None = KEEP,
        reply_from: int | None = KEEP,
        return_exceptions: bool = KEEP,
        on_error: Literal["fail", "continue"] = KEEP,
        grace: float = KEEP,
        slow_after: float | None = KEEP,
    ) -> Any:
        """A view of the same ranks whose calls have these options; what is not given stays.

        timeout: seconds from the submission to the call's deadline; CallTimeout after it.
        reply_from: all ranks run, this rank's value is the result; the others' are not sent.
        return_exceptions: exceptions come as values, in place; waits for every rank.
        on_error: "fail": after one rank's failure the others have `grace` seconds (default 30),
            then the group breaks; "continue": they are left. By default "fail" for several ranks.
        slow_after: seconds after which an open call is logged, once, with its ranks' stacks; `inf`:
            never. None: after a minute, or twice the method's longest time yet, without stacks.
        """
        made = self._options.changed(
            self._ranks, timeout, reply_from, return_exceptions, on_error, grace, slow_after
        )
        bare = self._bare
        if made.reply_from is not None:
            bare = made.reply_from
        elif reply_from is not KEEP and len(self._ranks) > 1:
            bare = None
        return make_view(self._seat, self._ranks, self._group, bare, made)

    def _pick(self, index: object) -> View:
        picked = pick(self._ranks, index)
        ranks = (picked,) if isinstance(picked, int) else picked
        options = self._options.narrowed(ranks)
        bare = picked if isinstance(picked, int) else options.reply_from
        return make_view(self._seat, ranks, self._group, bare, options)


class OneView(View):
    """A view whose calls give one rank's bare value."""

    @overload
    def call(
        self, method: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...
    @overload
    def call(self, method: str, /, *args: Any, **kwargs: Any) -> Any: ...
    def call(self, method: object, /, *args: Any, **kwargs: Any) -> Any:
        """Run `method` on the view's ranks and wait for the value. Raises what it raised."""
        engine = self._seat.engine
        return self._run(engine, self._make(engine, method, args, kwargs))

    @overload
    def submit(
        self, method: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> GroupFuture[R]: ...
    @overload
    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> GroupFuture[Any]: ...
    def submit(self, method: object, /, *args: Any, **kwargs: Any) -> GroupFuture[Any]:
        """Like `call`, but returns at once, never blocks, and gives a future."""
        engine = self._seat.engine
        return self._submit(engine, self._make(engine, method, args, kwargs))

    @overload
    def scatter(
        self,
        method: Callable[Concatenate[Any, T, P], R],
        parts: Sequence[T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R: ...
    @overload
    def scatter(self, method: str, parts: Sequence[Any], /, *args: Any, **kwargs: Any) -> Any: ...
    def scatter(self, method: object, parts: object, /, *args: Any, **kwargs: Any) -> Any:
        """`call`, with the i-th of `parts` before the other arguments for the i-th rank."""
        engine = self._seat.engine
        return self._run(engine, self._scatter(engine, method, parts, args, kwargs))

    @overload
    def __getitem__(self, index: int) -> OneView: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int]) -> ManyView: ...
    def __getitem__(self, index: Any) -> Any:
        return self._pick(index)

    if TYPE_CHECKING:

        @overload
        def options(
            self,
            timeout: float | None = ...,
            reply_from: int = ...,
            return_exceptions: bool = ...,
            on_error: Literal["fail", "continue"] = ...,
            grace: float = ...,
            slow_after: float | None = ...,
        ) -> OneView: ...
        @overload  # with reply_from=None it may be a view of several ranks again
        def options(
            self,
            timeout: float | None = ...,
            reply_from: int | None = ...,
            return_exceptions: bool = ...,
            on_error: Literal["fail", "continue"] = ...,
            grace: float = ...,
            slow_after: float | None = ...,
        ) -> Any: ...
        def options(self, *args: Any, **kwargs: Any) -> Any: ...

    @property
    def rank(self) -> int:
        """The rank whose value its calls give."""
        assert self._bare is not None
        return self._bare


class ManyView(View):
    """A view whose calls give a list, in the view's order."""

    @overload
    def call(
        self, method: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> list[R]: ...
    @overload
    def call(self, method: str, /, *args: Any, **kwargs: Any) -> list[Any]: ...
    def call(self, method: object, /, *args: Any, **kwargs: Any) -> Any:
        """Run `method` on every rank of the view and wait: a list, in the view's order.

        method: a function of the worker's class, its name, or any callable, which is sent by value
            and called as `f(worker, *args, **kwargs)`. All that follows is the method's own.
        Raises what the rank raised that failed first; see `options` for the rest.
        """
        engine = self._seat.engine
        return self._run(engine, self._make(engine, method, args, kwargs))

    @overload
    def submit(
        self, method: Callable[Concatenate[Any, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> GroupFuture[list[R]]: ...
    @overload
    def submit(self, method: str, /, *args: Any, **kwargs: Any) -> GroupFuture[list[Any]]: ...
    def submit(self, method: object, /, *args: Any, **kwargs: Any) -> GroupFuture[Any]:
        """Like `call`, but returns at once, never blocks, and gives a future."""
        engine = self._seat.engine
        return self._submit(engine, self._make(engine, method, args, kwargs))

    @overload
    def scatter(
        self,
        method: Callable[Concatenate[Any, T, P], R],
        parts: Sequence[T],
        /,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> list[R]: ...
    @overload
    def scatter(
        self, method: str, parts: Sequence[Any], /, *args: Any, **kwargs: Any
    ) -> list[Any]: ...
    def scatter(self, method: object, parts: object, /, *args: Any, **kwargs: Any) -> Any:
        """`call`, with the i-th of `parts` before the other arguments for the i-th rank.

        Raises ValueError where `parts` has not one item a rank.
        """
        engine = self._seat.engine
        return self._run(engine, self._scatter(engine, method, parts, args, kwargs))

    @overload
    def __getitem__(self, index: int) -> OneView: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int]) -> ManyView: ...
    def __getitem__(self, index: Any) -> Any:
        return self._pick(index)

    if TYPE_CHECKING:

        @overload
        def options(
            self,
            timeout: float | None = ...,
            *,
            reply_from: int,
            return_exceptions: bool = ...,
            on_error: Literal["fail", "continue"] = ...,
            grace: float = ...,
            slow_after: float | None = ...,
        ) -> OneView: ...
        @overload
        def options(
            self,
            timeout: float | None = ...,
            reply_from: None = ...,
            return_exceptions: bool = ...,
            on_error: Literal["fail", "continue"] = ...,
            grace: float = ...,
            slow_after: float | None = ...,
        ) -> ManyView: ...
        @overload
        def options(
            self,
            timeout: float | None = ...,
            reply_from: int | None = ...,
            return_exceptions: bool = ...,
            on_error: Literal["fail", "continue"] = ...,
            grace: float = ...,
            slow_after: float | None = ...,
        ) -> Any: ...
        def options(self, *args: Any, **kwargs: Any) -> Any: ...


def make_view(
    seat: Seat, ranks: tuple[int, ...], group: object, bare: int | None, options: Options
) -> View:
    view: View = ManyView() if bare is None else OneView()
    view._init_view(seat, ranks, group, bare, options)
    return view
