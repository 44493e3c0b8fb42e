import os
from pathlib import Path

import pytest

from pixellm.jobs.train.build_lock import (
    OP_NAME,
    build_root,
    needs_compilation,
    remove_stale_locks,
    stale_locks_removed,
)


def make_lock(root: Path, *, age_s: float, is_built: bool) -> Path:
    folder = root / "py311_cpu" / OP_NAME
    folder.mkdir(parents=True)
    if is_built:
        (folder / f"{OP_NAME}.so").touch()
    lock = folder / "lock"
    lock.touch()
    os.utime(lock, (1000.0 - age_s, 1000.0 - age_s))
    return lock


@pytest.mark.parametrize(
    ("age_s", "is_built", "is_stale"),
    [(5, True, False), (300, True, True), (300, False, False), (3600, False, True)],
    ids=["loading", "killed while loading", "compiling", "killed while compiling"],
)
def test_a_lock_is_removed_when_no_living_process_would_still_hold_it(
    tmp_path: Path, age_s: float, is_built: bool, is_stale: bool
) -> None:
    lock = make_lock(tmp_path, age_s=age_s, is_built=is_built)

    removed = remove_stale_locks(tmp_path, now_s=1000.0)

    assert removed == ([lock] if is_stale else [])
    assert lock.exists() is not is_stale
    assert needs_compilation(tmp_path) is not is_built


def test_a_start_that_waits_for_a_dead_process_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.file_baton import FileBaton

    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    lock = make_lock(tmp_path, age_s=1000.0, is_built=True)
    assert build_root() == tmp_path

    with stale_locks_removed():
        FileBaton(str(lock)).wait()  # without the watch, this never returns

    assert not lock.exists()
