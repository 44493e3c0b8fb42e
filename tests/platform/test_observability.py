"""Log lines and the progress line."""

import io
import logging
import os
import pty
import subprocess
import sys
import warnings
from collections.abc import Iterator

import pytest

from pixellm.errors import ConfigError
from pixellm.platform.observability import ProgressLine, configure_logging, format_duration, format_progress


class Clock:
    """Seconds that the test moves by hand."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def untouched_logging() -> Iterator[None]:
    """Puts handlers, levels and warning filters back as they were."""
    handlers, level = list(logging.root.handlers), logging.getLogger("pixellm").level
    with warnings.catch_warnings():
        yield
    logging.root.handlers[:] = handlers
    logging.getLogger("pixellm").setLevel(level)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (59.6, "1:00"), (3599, "59:59"), (3600, "1:00:00"), (-5, "0:00")]
)
def test_durations_read_as_a_clock(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_a_progress_line_says_step_losses_throughput_and_time_left() -> None:
    line = format_progress(40, 600, {"loss": 1.20391, "dice": 0.5}, 9.84, 201)
    assert line == "step 40/600 · loss 1.204 · dice 0.5 · 9.84 samples/s · 3:21 left"
    assert format_progress(1, 2, {}, None, None) == "step 1/2"


def test_without_a_terminal_plain_lines_come_now_and_then_and_the_last_always() -> None:
    stream, clock = io.StringIO(), Clock()
    with ProgressLine(50, stream=stream, plain_every_s=10, clock=clock) as line:
        for step in range(1, 51):
            line.update(step, {"loss": 1 / step})
            clock.now_s += 1
        line.note("checkpoint written")
    steps = [text.split()[1] for text in stream.getvalue().splitlines()[:-1]]
    assert steps == ["1/50", "11/50", "21/50", "31/50", "41/50", "50/50"]
    assert stream.getvalue().splitlines()[-1] == "checkpoint written"
    assert "\x1b" not in stream.getvalue()


def test_time_left_counts_from_the_first_update_so_that_a_resumed_start_is_not_pace() -> None:
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine(1000, stream=stream, plain_every_s=0, clock=clock)
    clock.now_s = 500  # set-up
    line.update(900, {})
    clock.now_s = 520
    line.update(910, {})  # 10 steps in 20 s, 90 are left
    assert stream.getvalue().splitlines() == ["step 900/1000", "step 910/1000 · 3:00 left"]


def test_on_a_terminal_a_bar_is_redrawn_and_notes_stand_above_it() -> None:
    code = (
        "from pixellm.platform.observability import ProgressLine\n"
        "with ProgressLine(4) as line:\n"
        "    for step in range(1, 5): line.update(step, {'loss': 0.5 / step}, 2.0)\n"
        "    line.note('kept [red]3[/red] files')\n"
    )
    parent, child = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=child, stdout=child, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(child)
    output = b""
    while True:
        try:
            chunk = os.read(parent, 4096)
        except OSError:  # the terminal's other end is closed
            break
        if not chunk:
            break
        output += chunk
    os.close(parent)
    assert process.wait(60) == 0
    text = output.decode()
    assert "step 4/4 · loss 0.125 · 2 samples/s" in text
    assert "kept [red]3[/red] files" in text  # as written, not as markup
    assert "\x1b[2K" in text  # the line is redrawn in place


@pytest.mark.usefixtures("untouched_logging")
def test_the_level_comes_from_the_environment_and_libraries_stay_quiet(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIXELLM_LOG_LEVEL", "info")
    logging.root.handlers[:] = []
    configure_logging()
    configure_logging()  # twice is once
    logging.getLogger("pixellm.jobs").info("ours")
    logging.getLogger("mlflow.store").info("theirs")
    logging.getLogger("PIL.Image").warning("worth saying")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split(" ", 1)[1] for line in captured.err.splitlines()] == [
        "INFO pixellm.jobs: ours",
        "WARNING PIL.Image: worth saying",
    ]


@pytest.mark.usefixtures("untouched_logging")
def test_an_unknown_level_is_an_error_that_lists_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELLM_LOG_LEVEL", "loud")
    with pytest.raises(ConfigError, match="DEBUG, INFO, WARNING, ERROR"):
        configure_logging()
