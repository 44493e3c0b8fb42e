"""What a person sees while a job runs: log lines worth reading, and one progress line.

`configure_logging` sets the level (`PIXELLM_LOG_LEVEL`, default WARNING) and quiets the libraries beneath us.
`ProgressLine` draws a bar on a terminal and prints a plain line now and then everywhere else (files, CI, Ray job logs).
"""

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from pixellm.errors import ConfigError
from pixellm.platform.settings import from_environment

_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# Libraries that talk at INFO (or warn about what is none of the user's business), and the least that they may say.
_QUIET: dict[str, int] = {
    "alembic": logging.WARNING,
    "DeepSpeed": logging.ERROR,
    "filelock": logging.WARNING,
    "httpcore": logging.WARNING,
    "httpx": logging.WARNING,
    "mlflow": logging.WARNING,
    "PIL": logging.WARNING,
    "ray": logging.WARNING,
    "transformers": logging.ERROR,
    "urllib3": logging.ERROR,
}
_CHILD_VARIABLES = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray announces a future default with each task without a GPU
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",  # transformers' bars for loading a few weights; our own line is rich's
    "TRANSFORMERS_VERBOSITY": "error",
}


def configure_logging(level: str | None = None) -> None:
    """Sets up logging of this process, and through the environment of those it starts. Safe to call again.

    Args:
        level: DEBUG, INFO, WARNING or ERROR, for our own messages; None: `PIXELLM_LOG_LEVEL`, else WARNING. With DEBUG
            the libraries speak up too.

    Raises:
        ConfigError: the level is none of these.
    """
    wanted = (level or from_environment().get("PIXELLM_LOG_LEVEL") or "WARNING").upper()
    if wanted not in _LEVELS:
        raise ConfigError(f"the log level is {wanted!r} (PIXELLM_LOG_LEVEL); wanted one of {', '.join(_LEVELS)}")
    if not any(getattr(handler, "is_pixellm", False) for handler in logging.root.handlers):
        handler = logging.StreamHandler()  # standard error: standard output belongs to results
        handler.setFormatter(logging.Formatter(_FORMAT, datefmt="%H:%M:%S"))
        handler.is_pixellm = True  # type: ignore[attr-defined]
        logging.root.addHandler(handler)
    logging.getLogger("pixellm").setLevel(wanted)
    if wanted == "DEBUG":
        return
    for name, quiet_level in _QUIET.items():
        logging.getLogger(name).setLevel(quiet_level)
    for category in (FutureWarning, DeprecationWarning):  # for the developers of those libraries, not for their users
        warnings.simplefilter("ignore", category)
    for name, value in _CHILD_VARIABLES.items():
        os.environ.setdefault(name, value)


def format_progress(
    step: int,
    total: int,
    values: Mapping[str, float],
    samples_per_s: float | None,
    left_s: float | None,
    unit: str = "step",
) -> str:
    """One line of progress: `step 40/600 · loss 1.204 · 9.8 samples/s · 3:21 left`.

    Args:
        step: steps done.
        total: steps in all.
        values: name → number, shown in this order.
        samples_per_s: throughput; None leaves it out.
        left_s: estimated seconds until the end; None leaves it out.
        unit: what is counted.
    """
    parts = [f"{unit} {step}/{total}"]
    parts += [f"{name} {_short(value)}" for name, value in values.items()]
    if samples_per_s is not None:
        parts.append(f"{_short(samples_per_s)} samples/s")
    if left_s is not None:
        parts.append(f"{format_duration(left_s)} left")
    return " · ".join(parts)


def format_duration(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from an hour on."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class ProgressLine:
    """Progress of a job with a known number of steps.

    Time left is estimated from the pace since the first update, so that set-up and a resumed start do not count.

    Args:
        total: steps in all.
        unit: what is counted.
        stream: where it goes; standard error unless given.
        plain_every_s: seconds between plain lines where there is no terminal; the last step is always printed.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        total: int,
        *,
        unit: str = "step",
        stream: TextIO | None = None,
        plain_every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total
        self._unit = unit
        self._stream = stream or sys.stderr
        self._plain_every_s = plain_every_s
        self._clock = clock
        self._first: tuple[int, float] | None = None
        self._last_printed_s: float | None = None
        self._bar: Any = None
        self._task: Any = None
        if self._stream.isatty():
            self._open_bar()

    def update(self, step: int, values: Mapping[str, float], samples_per_s: float | None = None) -> None:
        """Shows that `step` steps are done.

        Args:
            step: steps done, of `total`.
            values: loss parts and the like, shown in this order.
            samples_per_s: throughput, when known.
        """
        line = format_progress(step, self._total, values, samples_per_s, self._left_s(step), self._unit)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=line)
            return
        now = self._clock()
        is_due = self._last_printed_s is None or now - self._last_printed_s >= self._plain_every_s
        if is_due or step >= self._total:
            self._last_printed_s = now
            print(line, file=self._stream, flush=True)

    def note(self, text: str) -> None:
        """Prints a line of its own above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last state of the bar on the screen. A second call does nothing."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _open_bar(self) -> None:
        from rich.console import Console  # slow, and only for terminals
        from rich.progress import BarColumn, Progress, TextColumn

        console = Console(file=self._stream)
        self._bar = Progress(
            BarColumn(bar_width=20), TextColumn("{task.description}", markup=False), console=console, transient=False
        )
        self._task = self._bar.add_task("starting", total=self._total)
        self._bar.start()

    def _left_s(self, step: int) -> float | None:
        now = self._clock()
        if self._first is None:
            self._first = (step, now)
            return None
        first_step, first_s = self._first
        if step <= first_step:
            return None
        return (now - first_s) / (step - first_step) * (self._total - step)


def _short(value: float) -> str:
    return f"{value:.4g}"
