"""Checkpoints on disk: what is whole counts, what is not is named and passed over."""

import json
import shutil
from pathlib import Path

import pytest

from pixellm.errors import CheckpointError
from pixellm.jobs.train.checkpoints import CheckpointFolder, CheckpointMeta, describe_file, read_checkpoint


def _write(folder: CheckpointFolder, step: int, content: bytes = b"weights") -> Path:
    writing = folder.start(step)
    (writing / "weights.safetensors").write_bytes(content + str(step).encode())
    (writing / "optimizer-00000-of-00001.safetensors").write_bytes(b"moments")
    files = tuple(describe_file(path) for path in sorted(writing.iterdir()))
    return folder.commit(writing, CheckpointMeta(step, 8 * step, 1, files, {"seed": 0}, "abc")).path


def test_a_committed_checkpoint_reads_back_as_it_was_described(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    path = _write(folder, 20)
    checkpoint = read_checkpoint(path)
    assert (checkpoint.meta.step, checkpoint.meta.position, checkpoint.meta.world_size) == (20, 160, 1)
    assert checkpoint.meta.config == {"seed": 0}
    assert checkpoint.weights_path.read_bytes() == b"weights20"
    assert [p.name for p in checkpoint.optimizer_paths] == ["optimizer-00000-of-00001.safetensors"]


def test_a_write_that_was_interrupted_is_never_picked_up(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    _write(folder, 10)
    writing = folder.start(20)
    (writing / "weights.safetensors").write_bytes(b"half")
    latest, problems = folder.latest_valid()
    assert latest is not None
    assert latest.meta.step == 10
    assert not problems
    folder.remove_unfinished()
    assert not writing.exists()


def _flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: _flip_a_byte(p / "weights.safetensors"), r"step-000020 is damaged: .*weights\.safetensors"),
        (lambda p: (p / "weights.safetensors").write_bytes(b"w"), r"has 1 bytes, wanted 9"),
        (lambda p: (p / "optimizer-00000-of-00001.safetensors").unlink(), r"step-000020 is incomplete: optimizer"),
        (lambda p: (p / "meta.json").unlink(), r"it has no meta\.json"),
        (lambda p: (p / "meta.json").write_text("{"), r"meta\.json cannot be read"),
        (lambda p: (p / "meta.json").write_text(json.dumps({"schema_version": 99})), r"has layout 99"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, damage: object, said: str) -> None:
    folder = CheckpointFolder(tmp_path)
    _write(folder, 10)
    damage(_write(folder, 20))  # type: ignore[operator]
    latest, problems = folder.latest_valid()
    assert latest is not None
    assert latest.meta.step == 10
    assert len(problems) == 1
    with pytest.raises(CheckpointError, match=said):
        raise CheckpointError(problems[0])


def test_when_no_checkpoint_is_whole_the_error_names_each_and_the_mend(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (10, 20):
        (_write(folder, step) / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"step-000020.*step-000010.*--fresh"):
        folder.latest_valid()


def test_without_checkpoints_there_is_none_and_nothing_is_wrong(tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "absent").latest_valid() == (None, [])


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    for step in (5, 10, 1_000_000, 20):
        _write(folder, step)
    folder.prune(2)
    assert folder.steps() == [20, 1_000_000]


def test_a_file_that_is_not_as_described_stops_the_commit(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    writing = folder.start(10)
    path = writing / "weights.safetensors"
    path.write_bytes(b"weights")
    record = describe_file(path)
    path.write_bytes(b"weigh")
    with pytest.raises(CheckpointError, match="was not written whole"):
        folder.commit(writing, CheckpointMeta(10, 80, 1, (record,)))
    assert folder.steps() == []


def test_a_step_that_is_written_again_replaces_the_former_one(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    _write(folder, 10, b"old")
    shutil.copytree(folder.path_of(10), tmp_path / "copy")
    _write(folder, 10, b"new")
    assert read_checkpoint(folder.path_of(10)).weights_path.read_bytes() == b"new10"
