"""What has been asked, answered and paid: one SQLite file that survives kill -9 at any moment.

An answer is committed (write-ahead log, synced) before anyone sees it, so that a run that starts again never asks for
it a second time. Money is set aside, on disk, before a request leaves: what a killed run had in flight is found as set
aside and unanswered, and counts against the budget as if it had been paid. All amounts are whole nano-dollars.
"""

import fcntl
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pixellm.errors import DataError

NANO = 10**9
LEDGER_FILE, LOCK_FILE = "ledger.sqlite", "ledger.lock"

Kind = Literal["caption", "ask", "repair", "judge"]


@dataclass(frozen=True, slots=True)
class Answer:
    """A paid answer. `text` is empty where the model refused; `is_cut` says that it ran into the token limit."""

    text: str
    is_refused: bool
    is_cut: bool
    prompt_tokens: int
    completion_tokens: int
    cost_nusd: int


@dataclass(frozen=True, slots=True)
class Want:
    """Asks for permission to send a request that costs at most `reserve_nusd`, or for its answer if there is one.

    `holder` names the worker: a request that another one has been about for too long is taken over from it.
    """

    key: str
    kind: Kind
    reserve_nusd: int
    holder: str = ""


@dataclass(frozen=True, slots=True)
class Settle:
    """An answer has come; it takes the place of what was set aside."""

    key: str
    answer: Answer


@dataclass(frozen=True, slots=True)
class Release:
    """An attempt ended without an answer. It may have been billed all the same (a time-out, a cut stream)."""

    key: str
    may_be_billed: bool


@dataclass(frozen=True, slots=True)
class Finish:
    """One picture has been gone through: its outcome as JSON text, under the row's number.

    An outcome that is not final (the service or the money failed) is kept, and the next run asks for the rest of it.
    """

    row: int
    outcome: str
    is_final: bool


Message = Want | Settle | Release | Finish


@dataclass(frozen=True, slots=True)
class Granted:
    """The request may be sent; the money is set aside."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Not now: what is set aside for others may turn out cheaper."""


@dataclass(frozen=True, slots=True)
class Over:
    """The budget does not allow it any more."""


@dataclass(frozen=True, slots=True)
class Noted:
    """Written down."""


Reply = Granted | Wait | Over | Noted | Answer


@dataclass(frozen=True, slots=True)
class Balance:
    """What the ledger says.

    Attributes:
        spent_nusd: cost of all answers.
        lost_nusd: at most this was billed for attempts that gave no answer (time-outs, cut streams, killed runs).
        requests: answers by kind.
        lost_requests: how many attempts those were.
        is_over: whether a picture was refused for lack of money.
    """

    spent_nusd: int
    lost_nusd: int
    requests: dict[str, int]
    lost_requests: int
    is_over: bool


class Ledger:
    """The file, opened by one process at a time; see `open_ledger`.

    Args:
        folder: on this machine's disk.
        run: digest of everything that decides the outcomes; outcomes of other runs are not seen, answers are.
        budget_nusd: what all answers together may cost; None: no limit.
        stale_s: after so long another worker's request counts as lost with it.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        folder: Path,
        run: str,
        budget_nusd: int | None,
        *,
        stale_s: float = 600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._file = folder / LEDGER_FILE
        self._database = sqlite3.connect(self._file, isolation_level=None, check_same_thread=False)
        self._database.executescript(_SCHEMA)
        self._run, self._budget = run, budget_nusd
        self._stale_s, self._clock = stale_s, clock
        self._pending: dict[str, _Pending] = {}
        self._set_aside = 0
        self._is_over = False
        with self._transaction():
            self._database.execute("INSERT INTO lost SELECT kind, reserved FROM pending")
            self._database.execute("DELETE FROM pending")
        self._spent = self._one_number("SELECT COALESCE(SUM(cost), 0) FROM answers")
        self._lost = self._one_number("SELECT COALESCE(SUM(reserved), 0) FROM lost")
        self._largest: dict[str, int] = dict(
            self._database.execute("SELECT kind, MAX(cost) FROM answers GROUP BY kind")
        )

    def apply(self, messages: Sequence[Message]) -> list[Reply]:
        """Carries messages out in one synced transaction and returns a reply for each.

        Raises:
            DataError: they cannot be written (a full disk); the run must end, what was written before stays.
        """
        try:
            with self._transaction():
                return [self._apply(message) for message in messages]
        except sqlite3.Error as error:
            raise DataError(f"the ledger {self._file} cannot be written: {error}; make room and start again") from None

    def finished_rows(self) -> set[int]:
        """Numbers of the rows whose outcome is final."""
        query = "SELECT row FROM outcomes WHERE run = ? AND is_final"
        return {row for (row,) in self._database.execute(query, (self._run,))}

    def outcomes(self) -> Iterator[tuple[int, str]]:
        """(row, outcome) in the rows' order."""
        yield from self._database.execute("SELECT row, outcome FROM outcomes WHERE run = ? ORDER BY row", (self._run,))

    def balance(self) -> Balance:
        """The sums so far."""
        requests = dict(self._database.execute("SELECT kind, COUNT(*) FROM answers GROUP BY kind ORDER BY kind"))
        lost_requests = self._one_number("SELECT COUNT(*) FROM lost")
        return Balance(self._spent, self._lost, requests, lost_requests, self._is_over)

    def close(self) -> None:
        """Closes the file."""
        self._database.close()

    def _apply(self, message: Message) -> Reply:
        if isinstance(message, Want):
            return self._known_answer(message.key) or self._permit(message)
        if isinstance(message, Settle | Release) and message.key not in self._pending:
            return Noted()  # another worker has taken it over; what it cost is booked as lost
        if isinstance(message, Settle):
            self._settle(message)
        elif isinstance(message, Release):
            pending = self._forget(message.key)
            if message.may_be_billed:
                self._lose(pending)
        else:
            outcome = (self._run, message.row, message.outcome, message.is_final)
            self._database.execute("INSERT OR REPLACE INTO outcomes VALUES (?, ?, ?, ?)", outcome)
        return Noted()

    def _known_answer(self, key: str) -> Answer | None:
        known = self._database.execute(
            "SELECT text, is_refused, is_cut, prompt_tokens, completion_tokens, cost FROM answers WHERE key = ?", (key,)
        ).fetchone()
        if known is None:
            return None
        text, is_refused, is_cut, *numbers = known
        return Answer(text, bool(is_refused), bool(is_cut), *numbers)

    def _permit(self, want: Want) -> Reply:
        pending = self._pending.get(want.key)
        if pending is not None:
            if pending.holder == want.holder or self._clock() - pending.since_s < self._stale_s:
                return Wait()  # the same request is under way; its answer will serve both
            self._lose(self._forget(want.key))
        reserve = want.reserve_nusd
        if self._budget is not None:
            if self._is_over and want.kind in ("caption", "ask"):
                return Over()
            largest = self._largest.get(want.kind) or max(self._largest.values(), default=0)
            reserve = max(reserve, largest + largest // 4)
            # before the first answer nobody knows what an answer costs: one at a time
            is_first_wave = not self._largest and bool(self._pending)
            if is_first_wave or self._spent + self._lost + self._set_aside + reserve > self._budget:
                if self._pending:
                    return Wait()
                self._is_over = True
                return Over()
        self._pending[want.key] = _Pending(want.kind, reserve, want.holder, self._clock())
        self._set_aside += reserve
        self._database.execute("INSERT INTO pending VALUES (?, ?, ?)", (want.key, want.kind, reserve))
        return Granted()

    def _settle(self, message: Settle) -> None:
        kind = self._forget(message.key).kind
        answer = message.answer
        row = (message.key, kind, answer.text, answer.is_refused, answer.is_cut)
        numbers = (answer.prompt_tokens, answer.completion_tokens, answer.cost_nusd)
        self._database.execute("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*row, *numbers))
        self._spent += answer.cost_nusd
        self._largest[kind] = max(self._largest.get(kind, 0), answer.cost_nusd)

    def _forget(self, key: str) -> "_Pending":
        pending = self._pending.pop(key)
        self._set_aside -= pending.reserved_nusd
        self._database.execute("DELETE FROM pending WHERE key = ?", (key,))
        return pending

    def _lose(self, pending: "_Pending") -> None:
        self._database.execute("INSERT INTO lost VALUES (?, ?)", (pending.kind, pending.reserved_nusd))
        self._lost += pending.reserved_nusd

    def _one_number(self, query: str) -> int:
        return int(self._database.execute(query).fetchone()[0])

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")


@dataclass(frozen=True, slots=True)
class _Pending:
    """A request that may be under way."""

    kind: Kind
    reserved_nusd: int
    holder: str
    since_s: float


@contextmanager
def open_ledger(
    folder: Path, run: str, budget_nusd: int | None, *, stale_s: float = 600.0, wait_s: float = 30.0
) -> Iterator[Ledger]:
    """Opens the ledger of a folder for this process alone.

    Args:
        folder: made if it is absent.
        run: see `Ledger`.
        budget_nusd: see `Ledger`.
        stale_s: see `Ledger`.
        wait_s: how long to wait for another process to end (the workers of a killed run take a moment).

    Raises:
        DataError: another process keeps it open, or the file is no ledger.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_FILE).open("a") as lock:
        _lock(lock.fileno(), folder, wait_s)
        try:
            ledger = Ledger(folder, run, budget_nusd, stale_s=stale_s)
        except sqlite3.DatabaseError as error:
            raise DataError(f"{folder / LEDGER_FILE} cannot be used: {error}; choose another --out") from None
        try:
            yield ledger
        finally:
            ledger.close()


def _lock(descriptor: int, folder: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise DataError(f"another run is writing to {folder}; wait until it ends, or stop it") from None
            time.sleep(0.1)
        else:
            return


_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, text TEXT NOT NULL, is_refused INTEGER NOT NULL, is_cut INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL, cost INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pending (key TEXT PRIMARY KEY, kind TEXT NOT NULL, reserved INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS lost (kind TEXT NOT NULL, reserved INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS outcomes (
    run TEXT NOT NULL, row INTEGER NOT NULL, outcome TEXT NOT NULL, is_final INTEGER NOT NULL, PRIMARY KEY (run, row)
) WITHOUT ROWID;
"""
