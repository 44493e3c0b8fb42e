"""Storage by URI: atomic folders, errors that name the mend, other stores."""

import os
from pathlib import Path

import pytest

from pixellm.errors import DataError
from pixellm.platform import storage


def write_dataset(uri: str | Path, content: str) -> None:
    with storage.atomic_write_dir(uri, commit_file="done.json") as folder:
        (folder / "done.json").write_text(content)
        (folder / "data.bin").write_text(content * 2)


@pytest.mark.parametrize("prefix", ["", "file://"])
def test_a_written_folder_appears_whole_and_replaces_the_older_one(tmp_path: Path, prefix: str) -> None:
    uri = f"{prefix}{tmp_path}/deep/set"

    write_dataset(uri, "one")
    write_dataset(uri, "two")

    assert storage.read_bytes(storage.join(uri, "data.bin")) == b"twotwo"
    assert storage.list_names(uri) == ["data.bin", "done.json"]
    assert os.listdir(tmp_path / "deep") == ["set"]


def test_a_failed_write_leaves_the_older_folder_and_no_rubbish(tmp_path: Path) -> None:
    write_dataset(tmp_path / "set", "one")

    with pytest.raises(RuntimeError, match="stop"), storage.atomic_write_dir(tmp_path / "set", commit_file="done.json"):
        raise RuntimeError("stop")

    assert storage.read_bytes(tmp_path / "set" / "done.json") == b"one"
    assert os.listdir(tmp_path) == ["set"]


def test_a_folder_or_file_that_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_text("precious")
    (tmp_path / "file").write_text("precious")

    for name in ("photos", "file"):
        with pytest.raises(DataError, match=r"not replaced; choose another place"):
            write_dataset(tmp_path / name, "one")

    assert (tmp_path / "photos" / "holiday.jpg").read_text() == "precious"
    assert (tmp_path / "file").read_text() == "precious"


def test_an_fsspec_store_takes_a_folder_and_gives_it_back() -> None:
    uri = "memory://pixellm-test/set"

    write_dataset(uri, "one")
    write_dataset(uri, "two")

    assert storage.is_dir(uri)
    assert storage.local_path(uri) is None
    assert storage.read_bytes(storage.join(uri, "data.bin")) == b"twotwo"


@pytest.mark.parametrize("content", [b"{not json", b"\xff\xfe\x00", b""])
def test_what_is_not_json_is_a_one_line_error_naming_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)

    with pytest.raises(DataError, match=r"a\.json is not JSON") as caught:
        storage.read_json(tmp_path / "a.json")

    assert "\n" not in str(caught.value)


def test_an_absent_file_and_an_unknown_scheme_are_data_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no file .*nothing\.json"):
        storage.read_json(tmp_path / "nothing.json")
    with pytest.raises(DataError, match="cannot open nosuchscheme://x"):
        storage.exists("nosuchscheme://x")
