"""How much one caller may ask: open requests at once, and requests per minute as a token bucket."""

from dataclasses import dataclass

from pixellm.errors import RateLimitedError
from pixellm.serve.auth import Caller

_COME_BACK_S = 1.0
_MAX_IDLE_CALLERS = 1000


@dataclass(slots=True)
class _Account:
    tokens: float
    seen_s: float
    num_open: int = 0


class CallerLimits:
    """Counts what each caller has open and how fast it asks; one ingress replica's own count.

    Args:
        max_concurrent: open requests of one caller; None sets no limit. A key may have its own.
        per_minute: requests of one caller in a minute, with a burst of as many; None sets no limit.
    """

    def __init__(self, max_concurrent: int | None, per_minute: int | None) -> None:
        self._max_concurrent = max_concurrent
        self._per_minute = per_minute
        self._accounts: dict[str, _Account] = {}

    def enter(self, caller: Caller, now_s: float) -> None:
        """Takes a request of a caller in; `leave` must follow once it is answered.

        Args:
            caller: who asks.
            now_s: monotonic clock, seconds.

        Raises:
            RateLimitedError: with the seconds after which it may ask again; then nothing is counted.
        """
        concurrent = caller.key.concurrent if caller.key and caller.key.concurrent else self._max_concurrent
        per_minute = caller.key.per_minute if caller.key and caller.key.per_minute else self._per_minute
        account = self._account(caller.name, per_minute, now_s)
        if concurrent is not None and account.num_open >= concurrent:
            raise RateLimitedError(
                f"{caller.name} has {account.num_open} requests open, as many as it may; wait for one to end",
                retry_after_s=_COME_BACK_S,
            )
        if per_minute is not None:
            if account.tokens < 1:
                wait_s = (1 - account.tokens) * 60 / per_minute
                raise RateLimitedError(
                    f"{caller.name} asks more than {per_minute} times a minute; come back in {wait_s:.1f} s",
                    retry_after_s=wait_s,
                )
            account.tokens -= 1
        account.num_open += 1

    def leave(self, caller: Caller) -> None:
        """A request that `enter` took in is over."""
        self._accounts[caller.name].num_open -= 1

    def _account(self, name: str, per_minute: int | None, now_s: float) -> _Account:
        account = self._accounts.get(name)
        if account is None:
            self._forget_idle()
            account = self._accounts[name] = _Account(float(per_minute or 0), now_s)
        if per_minute is not None:
            account.tokens = min(per_minute, account.tokens + (now_s - account.seen_s) * per_minute / 60)
        account.seen_s = now_s
        return account

    def _forget_idle(self) -> None:
        """Keeps the number of accounts bounded; the longest unseen that have nothing open go first."""
        if len(self._accounts) < _MAX_IDLE_CALLERS:
            return
        idle = sorted((a.seen_s, name) for name, a in self._accounts.items() if not a.num_open)
        for _seen_s, name in idle[: _MAX_IDLE_CALLERS // 2]:
            del self._accounts[name]
