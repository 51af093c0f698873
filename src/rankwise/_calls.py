"""A call, and the reasons why one may end without its answers: plain data, kept by the ledger."""

from __future__ import annotations

from rankwise._messages import CALL, FAILED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from rankwise._messages import Exited
    from rankwise._report import RankReport


class Call:
    """One call and what is known of it. Owned by the ledger; others read it, and set who is to be
    told: `future`, `watched`, `watchers`, `led`."""

    __slots__ = (
        "answers", "begun", "bodies", "body", "break_at", "deadline", "done", "dropped", "ended",
        "error", "future", "grace", "id", "kind", "late_failure",
        "led", "method", "on_error", "ranks",
        "reply_from", "return_exceptions", "shape", "slow", "stuck", "timeout", "watched",
        "watchers",
    )  # fmt: skip

    def __init__(
        self,
        method: str,
        body: bytes,
        ranks: tuple[int, ...],
        shape: int | None = None,
        bodies: dict[int, bytes] | None = None,
        deadline: float | None = None,
        reply_from: int | None = None,
        return_exceptions: bool = False,
        on_error: str = "continue",
        grace: float = 30.0,
        timeout: float | None = None,
        slow: tuple[float, float] | tuple[()] | None = None,
        kind: int = CALL,
    ) -> None:
        self.id = 0
        self.kind = kind
        self.method = method
        self.body = body
        self.bodies = bodies  # a body of its own for each rank (scatter, boot)
        self.ranks = ranks
        self.shape = shape  # the rank whose bare value is the result; None: a list
        self.deadline = deadline
        self.reply_from = reply_from  # the only rank whose value is wanted; None: all
        self.return_exceptions = return_exceptions
        self.on_error = on_error
        self.grace = grace
        self.timeout = timeout  # seconds from its submission to `deadline`
        # When it is to be logged as slow, and after how many seconds that is; (): never. None: the
        # group's own limit.
        self.slow = slow
        self.answers: dict[int, tuple[int, bytes]] = {}  # rank -> kind of frame, body
        self.error: Error | None = None  # settled by this, not by the answers
        self.break_at: float | None = None  # first failure + grace
        self.late_failure: tuple[int, bytes] | None = None  # the first after it was settled
        self.stuck: Stuck | None = None  # `break_at` has come: what is about to break the group
        self.begun = False  # a byte of it may have been sent to a rank
        self.dropped = False  # cancelled or expired before that: no rank will see it
        self.done = False  # settled: the future has its outcome
        self.ended = False  # no rank owes anything for it any more
        self.watchers: list[Callable[[], object]] | None = None  # told once it is done
        # Kept alive, and told once it is done; None while its holder leads: his frame keeps it.
        self.future: object = None
        self.watched = False  # by callbacks or `concurrent.futures.wait`: the future is to be told
        self.led = False  # an event loop leads for it: nobody else needs its outcome

    def body_for(self, rank: int) -> bytes:
        return self.body if self.bodies is None else self.bodies[rank]

    def failure(self) -> tuple[int, bytes] | None:
        """(rank, body) of the first failure to arrive among its answers, or None."""
        for rank, (kind, body) in list(self.answers.items()):
            if kind == FAILED:
                return rank, body
        return None

    def missing(self) -> list[int]:
        return [rank for rank in self.ranks if rank not in self.answers]


class Error:
    """Why a call was settled without its answers. The waiter makes the exception of it."""

    __slots__ = ()


class Expired(Error):
    """Its deadline passed; the ranks in `missing` had not answered.

    reports: what each of them was doing then, by rank; None until that is known.
    """

    __slots__ = ("missing", "reports")

    def __init__(self, missing: tuple[int, ...]) -> None:
        self.missing = missing
        self.reports: dict[int, RankReport] | None = None


class Lost(Error):
    """Rank `rank` ended while it owed `method` (call `call_id`), or while it was idle (None)."""

    __slots__ = ("call_id", "method", "rank", "report")

    def __init__(
        self, rank: int, report: Exited | None, method: str | None, call_id: int | None
    ) -> None:
        self.rank = rank
        self.report = report
        self.method = method
        self.call_id = call_id


class Stuck(Error):
    """`failed` of `call` failed, with `body`; `missing` had not finished in its grace period.

    reports: what each of `missing` was doing then, by rank; None where that is not known.
    """

    __slots__ = ("body", "call", "failed", "missing", "reports")

    def __init__(self, call: Call, failed: int, body: bytes, missing: tuple[int, ...]) -> None:
        self.call = call
        self.failed = failed
        self.body = body
        self.missing = missing
        self.reports: dict[int, RankReport] | None = None


class Garbled(Error):
    """What came from rank `rank` makes no sense, or does not come at all: `reason`.

    -1: it is no rank's doing, and the reason says whose.
    """

    __slots__ = ("rank", "reason")

    def __init__(self, rank: int, reason: str) -> None:
        self.rank = rank
        self.reason = reason


class Broken(Error):
    """The group broke for `cause` while the call was open (the call itself did not cause it)."""

    __slots__ = ("cause",)

    def __init__(self, cause: Error) -> None:
        self.cause = cause


class Closed(Error):
    """The caller closed the group; `exiting`: the interpreter did, on its way out."""

    __slots__ = ("exiting",)

    def __init__(self, exiting: bool = False) -> None:
        self.exiting = exiting


class Cancelled(Error):
    """The caller cancelled it before a byte was sent."""

    __slots__ = ()
