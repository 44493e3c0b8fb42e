"""The preparation jobs: reports that add up, byte-identical shards, statistics from an independent count, pictures."""

import json
import shutil
from pathlib import Path

import pytest

from pixellm.errors import DataError
from pixellm.jobs.prepare import prepare, prepare_demo
from pixellm.platform.data.shards import open_shards


@pytest.fixture(scope="module")
def demo_uris(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return prepare_demo(tmp_path_factory.mktemp("shards"))


def test_preparing_twice_gives_byte_identical_shards(demo_uris: dict[str, str], tmp_path: Path) -> None:
    again = prepare_demo(tmp_path)

    assert set(again) == {"segmentation", "vqa", "muse"}
    for group, uri in again.items():
        names = sorted(path.name for path in Path(uri).iterdir())
        assert names == sorted(path.name for path in Path(demo_uris[group]).iterdir())
        for name in names:
            assert (Path(uri) / name).read_bytes() == (Path(demo_uris[group]) / name).read_bytes()


def test_a_report_counts_what_was_kept_and_names_what_was_skipped(demo_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(demo_data, folder)
    photo = folder / "images" / "000000030213.jpg"
    photo.write_bytes(photo.read_bytes()[:5000])
    seen: list[tuple[int, int | None]] = []

    report = prepare("coco", folder, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))

    content = json.loads((folder / "instances.json").read_text())
    kept = [annotation for annotation in content["annotations"] if annotation["image_id"] != 30213]
    assert (report.rows, report.targets) == (31, len(kept))
    assert report.skipped == {"picture does not decode": 1}
    assert report.skipped_names == {"picture does not decode": ["000000030213.jpg"]}
    assert report.digest == open_shards(tmp_path / "out").digest
    assert "skipped 1: picture does not decode (000000030213.jpg)" in report.to_text()
    assert json.loads(json.dumps(report.to_json_dict()))["skipped"] == {"picture does not decode": 1}
    assert open_shards(tmp_path / "out").info.notes["skipped"] == {"picture does not decode": 1}
    assert seen == [(number, 32) for number in range(1, 33)]


def test_strict_stops_at_the_first_fault_and_writes_nothing(demo_data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    shutil.copytree(demo_data, folder)
    (folder / "images" / "000000030213.jpg").write_bytes(b"\xff\xd8\xff")

    with pytest.raises(DataError, match=r"000000030213\.jpg: picture does not decode"):
        prepare("coco", folder, tmp_path / "out", strict=True)

    assert not (tmp_path / "out").exists()


def test_nothing_kept_is_an_error_not_an_empty_dataset(demo_data: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    shutil.copy(demo_data / "instances.json", tmp_path)

    with pytest.raises(DataError, match="no row was kept"):
        prepare("coco", tmp_path, tmp_path / "out")
