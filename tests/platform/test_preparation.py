"""Preparation: the same bytes here and on Ray, and twice; nothing finished is made again, nothing stale is kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from pixellm.errors import DataError
from pixellm.jobs.prepare import DEMO_DATA, prepare
from pixellm.platform.data.shards import open_shards
from pixellm.platform.data.sources import source_names
from pixellm.platform.data.sources.base import PrepareReport
from tests.platform.data_builders import CocoFolder
from tests.platform.source_fixtures import SourceFixture, all_fixtures


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def some_pictures(folder: Path, count: int) -> CocoFolder:
    coco = CocoFolder(folder)
    for image_id in range(1, count + 1):
        coco.add_image(image_id)
        coco.add_box(image_id, image_id, 2, 2, 10, 10)
    coco.write()
    return coco


def test_every_source_has_a_fixture() -> None:
    assert {fixture.source for fixture in all_fixtures()} == set(source_names())


@pytest.mark.parametrize("fixture", all_fixtures(), ids=str)
def test_every_source_gives_the_known_counts_and_the_same_bytes_twice(fixture: SourceFixture, tmp_path: Path) -> None:
    reports: list[PrepareReport] = []
    for attempt in ("a", "b"):
        folder = tmp_path / attempt / "in"
        folder.mkdir(parents=True)
        fixture.build(folder)
        out = tmp_path / attempt / "out"
        options = dict(fixture.options)
        reports.append(prepare(fixture.source, folder, out, skip_bad_masks=fixture.skip_bad_masks, options=options))

    assert (reports[0].rows, reports[0].targets, reports[0].skipped) == (fixture.rows, fixture.targets, fixture.skipped)
    assert files(tmp_path / "a" / "out") == files(tmp_path / "b" / "out")
    open_shards(tmp_path / "a" / "out").verify()


@pytest.mark.drill  # 44 commands, each a driver that joins the cluster: about a minute and a half
def test_the_command_line_prepares_every_source_twice_into_the_same_bytes(ray_cluster: str, tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from typer.testing import CliRunner
        from pixellm.cli import app
        from tests.platform.source_fixtures import all_fixtures

        for fixture in all_fixtures():
            folder = Path(sys.argv[1]) / str(fixture)
            (folder / "in").mkdir(parents=True)
            fixture.build(folder / "in")
            options = [str(part) for name, value in fixture.options.items() for part in ("--" + name, value)]
            options = [option.replace("_", "-") if option.startswith("--") else option for option in options]
            options += ["--skip-bad-masks"] if fixture.skip_bad_masks else []
            for attempt in ("a", "b"):
                command = ["data", "prepare", fixture.source, "--in", folder / "in", "--out", folder / attempt / "set"]
                result = CliRunner().invoke(app, list(map(str, [*command, *options])))
                assert result.exit_code == 0, f"{command}: {result.output}"
    """
    environment = {**os.environ, "RAY_ADDRESS": ray_cluster}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True, env=environment)

    for fixture in all_fixtures():
        first, second = (files(tmp_path / str(fixture) / attempt / "set") for attempt in "ab")
        assert first == second
        assert "dataset.json" in first


def test_ray_tasks_make_the_bytes_that_this_process_makes(ray_cluster: str, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    here = prepare("coco", DEMO_DATA, tmp_path / "here" / "set", pictures_per_part=10)
    there = prepare(
        "coco",
        DEMO_DATA,
        tmp_path / "there" / "set",
        pictures_per_part=10,
        on_ray=True,
        progress=lambda done, total: seen.append((done, total)),
    )

    assert files(tmp_path / "here" / "set") == files(tmp_path / "there" / "set")
    assert (here.digest, here.rows) == (there.digest, 32)
    assert seen == [(10, 32), (20, 32), (30, 32), (32, 32)]


def test_a_fault_in_a_ray_task_is_our_own_one_line_error(ray_cluster: str, tmp_path: Path) -> None:
    coco = some_pictures(tmp_path / "in", 3)
    (coco.folder / "images" / "000000000002.jpg").write_bytes(b"no picture")

    with pytest.raises(DataError, match=r"^000000000002\.jpg: picture does not decode"):
        prepare("coco", coco.folder, tmp_path / "out", strict=True, on_ray=True)


def test_a_killed_preparation_goes_on_where_it_stopped_and_leaves_nothing_behind(tmp_path: Path) -> None:
    coco = some_pictures(tmp_path / "in", 12)
    script = f"""
        import os, signal
        from pixellm.jobs.prepare import prepare
        def progress(done, total):
            if done == 8:
                os.kill(os.getpid(), signal.SIGKILL)
        prepare("coco", {str(coco.folder)!r}, {str(tmp_path / "out" / "set")!r}, progress=progress, pictures_per_part=3)
    """
    killed = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    work = tmp_path / "out" / ".set.preparing"
    made = {path: path.stat().st_mtime_ns for path in (work / "content").glob("part-*")}

    assert killed.returncode == -signal.SIGKILL
    assert sorted(path.name for path in made) == ["part-00000.parquet", "part-00001.parquet"]

    report = prepare("coco", coco.folder, tmp_path / "out" / "set", pictures_per_part=3)
    prepare("coco", coco.folder, tmp_path / "undisturbed" / "other name", pictures_per_part=3)

    assert (report.rows, report.parts_found) == (12, 2)
    assert files(tmp_path / "out" / "set") == files(tmp_path / "undisturbed" / "other name")
    for path, changed in made.items():
        assert (tmp_path / "out" / "set" / path.name).stat().st_mtime_ns == changed
    assert os.listdir(tmp_path / "out") == ["set"]


def test_only_the_parts_whose_pictures_or_annotations_changed_are_made_again(tmp_path: Path) -> None:
    coco = some_pictures(tmp_path / "in", 9)
    picture = coco.folder / "images" / "000000000008.jpg"
    whole = picture.read_bytes()
    picture.write_bytes(b"no picture")

    with pytest.raises(DataError, match="does not decode"):
        prepare("coco", coco.folder, tmp_path / "set", strict=True, pictures_per_part=3)
    picture.write_bytes(whole)
    coco.annotations[0]["bbox"] = [2, 2, 9, 10]
    coco.write()
    report = prepare("coco", coco.folder, tmp_path / "set", strict=True, pictures_per_part=3)

    assert (report.rows, report.parts_found) == (9, 1)
    assert open_shards(tmp_path / "set").read_row(0).targets[0].box == (2, 2, 11, 12)


def test_a_part_made_with_faults_skipped_is_not_taken_for_a_strict_preparation(tmp_path: Path) -> None:
    coco = some_pictures(tmp_path / "in", 4)
    (coco.folder / "images" / "000000000001.jpg").write_bytes(b"no picture")
    coco.annotations[3]["segmentation"] = [[50, 5, 75, 5, 75, 15, 50, 15]]
    coco.write()

    with pytest.raises(DataError, match="mask outside its picture"):
        prepare("coco", coco.folder, tmp_path / "set", pictures_per_part=2)
    with pytest.raises(DataError, match=r"000000000001\.jpg: picture does not decode"):
        prepare("coco", coco.folder, tmp_path / "set", pictures_per_part=2, strict=True)
    with pytest.raises(DataError, match="mask outside its picture"):
        prepare("coco", coco.folder, tmp_path / "set", pictures_per_part=2)
    report = prepare("coco", coco.folder, tmp_path / "set", pictures_per_part=2, skip_bad_masks=True)

    assert report.parts_found == 1
    assert (report.rows, report.skipped["mask outside its picture"]) == (2, 1)


def test_a_damaged_part_of_an_interrupted_attempt_is_made_again(tmp_path: Path) -> None:
    coco = some_pictures(tmp_path / "in", 4)
    last = coco.folder / "images" / "000000000004.jpg"
    whole = last.read_bytes()
    last.unlink()
    with pytest.raises(DataError):
        prepare("coco", coco.folder, tmp_path / "set", pictures_per_part=1, strict=True)
    content, progress = (tmp_path / ".set.preparing" / name for name in ("content", "progress"))
    (content / "part-00000.parquet").write_bytes(b"PAR1")
    (progress / "report-00001.json").write_text('{"key": ')
    last.write_bytes(whole)

    report = prepare("coco", coco.folder, tmp_path / "set", pictures_per_part=1)

    assert report.parts_found == 1
    open_shards(tmp_path / "set").verify()


def test_an_attempt_that_finished_nothing_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()

    with pytest.raises(DataError, match=r"no instances\.json"):
        prepare("coco", tmp_path / "in", tmp_path / "out" / "set")

    assert os.listdir(tmp_path / "out") == []


def test_two_processes_do_not_prepare_one_place_at_a_time(tmp_path: Path) -> None:
    coco = some_pictures(tmp_path / "in", 3)
    errors: list[str] = []

    def progress(done: int, total: int | None) -> None:
        if done == 1:
            with pytest.raises(DataError) as caught:
                prepare("coco", coco.folder, tmp_path / "set")
            errors.append(str(caught.value))

    prepare("coco", coco.folder, tmp_path / "set", progress=progress)

    assert "another process is preparing" in errors[0]
    assert len(open_shards(tmp_path / "set")) == 3


def test_an_object_store_takes_shards_part_by_part_and_a_failed_attempt_leaves_the_older_ones(tmp_path: Path) -> None:
    coco = some_pictures(tmp_path / "in", 4)
    uri = "memory://pixellm-preparation/set"
    prepare("coco", coco.folder, uri, pictures_per_part=2)
    (coco.folder / "images" / "000000000004.jpg").unlink()

    with pytest.raises(DataError):
        prepare("coco", coco.folder, uri, pictures_per_part=2, strict=True)
    assert len(open_shards(uri)) == 4
    report = prepare("coco", coco.folder, uri, pictures_per_part=4)

    dataset = open_shards(uri)
    dataset.verify()
    assert (report.rows, len(dataset), [part.name for part in dataset.info.parts]) == (3, 3, ["part-00000.parquet"])


def test_the_command_prepares_on_a_cluster_and_reports(ray_cluster: str, tmp_path: Path) -> None:
    shutil.copytree(DEMO_DATA, tmp_path / "in")
    (tmp_path / "in" / "images" / "000000030213.jpg").write_bytes(b"no picture")
    command = [sys.executable, "-m", "pixellm.cli", "data", "prepare", "coco", "--json"]
    command += ["--in", str(tmp_path / "in"), "--out", str(tmp_path / "set")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "RAY_ADDRESS": ray_cluster}
    )

    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["rows"], report["skipped"]) == (31, {"picture does not decode": 1})
    assert report["digest"] == open_shards(tmp_path / "set").digest
