import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pixellm.jobs.train.build_lock import OP_NAME, alone_in, build_root, needs_compilation

# What a start does, without the minute of compiling: our lock, and torch's within it.
HOLDER = """
import sys
from pathlib import Path
from torch.utils.file_baton import FileBaton
from pixellm.jobs.train.build_lock import OP_NAME, alone_in

root = Path(sys.argv[1])
with alone_in(root):
    (root / OP_NAME).mkdir(exist_ok=True)
    baton = FileBaton(str(root / OP_NAME / "lock"))
    assert baton.try_acquire()
    sys.stdin.readline()
    (root / OP_NAME / f"{OP_NAME}.so").touch()
    baton.release()
"""


def start_holder(root: Path) -> subprocess.Popen[str]:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(root)], stdin=subprocess.PIPE, text=True)
    while not (root / OP_NAME / "lock").exists():
        assert holder.poll() is None, "it ended without the lock"
        time.sleep(0.05)
    return holder


def test_a_start_goes_on_after_one_that_was_killed_while_it_compiled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    holder = start_holder(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    lock = tmp_path / OP_NAME / "lock"
    assert lock.exists()  # torch would wait for it without end

    with alone_in(tmp_path):
        assert not lock.exists()

    assert str(lock) in caplog.text


def test_a_start_waits_for_one_that_compiles_however_long_it_takes(tmp_path: Path) -> None:
    holder = start_holder(tmp_path)
    second = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.DEVNULL)
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=5)
    assert needs_compilation(tmp_path)

    holder.communicate("\n", timeout=60)

    assert holder.returncode == 0  # its own lock was still there to be released
    assert second.wait(timeout=60) == 0
    assert not needs_compilation(tmp_path)


def test_the_folder_is_the_one_that_torch_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))

    assert build_root() == tmp_path
