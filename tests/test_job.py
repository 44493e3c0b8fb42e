"""A submitted job runs under Ray's own Python, wherever PATH points."""

import sys
from pathlib import Path

from pixellm.job import python_of_raylet


def _process(proc: Path, pid: int, parent: int, *words: str) -> None:
    (proc / str(pid)).mkdir(parents=True)
    (proc / str(pid) / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
    (proc / str(pid) / "stat").write_text(f"{pid} (a name) with ) in it) S {parent} 1 1")


def test_the_nearest_raylet_above_names_the_interpreter(tmp_path: Path) -> None:
    _process(tmp_path, 1, 0, "init")
    _process(tmp_path, 20, 1, "raylet", "--port=1", f"--python_worker_command={sys.executable} default_worker.py --x")
    _process(tmp_path, 30, 20, "ray::JobSupervisor")
    _process(tmp_path, 40, 30, "sh", "-c", "exec python3")
    assert python_of_raylet(40, tmp_path) == sys.executable


def test_without_a_raylet_or_with_one_whose_interpreter_is_gone_nothing_is_named(tmp_path: Path) -> None:
    _process(tmp_path, 1, 0, "init")
    _process(tmp_path, 20, 1, "raylet", "--python_worker_command=/no/such/python worker.py")
    _process(tmp_path, 40, 20, "python3")
    _process(tmp_path, 50, 1, "python3")
    assert python_of_raylet(40, tmp_path) is None
    assert python_of_raylet(50, tmp_path) is None
    assert python_of_raylet(60, tmp_path) is None
