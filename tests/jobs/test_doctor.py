"""The doctor: what is wrong is a row that names the mend, and never a hang or a traceback."""

import importlib.metadata
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from pixellm.jobs import doctor
from pixellm.jobs.doctor import DoctorReport, Row, check_disk, check_memory, check_python, check_requirements, diagnose
from pixellm.platform.settings import TrackingSettings

GIB = 2**30


def versions(**known: str) -> Callable[[str], str]:
    def installed(name: str) -> str:
        if name not in known:
            raise importlib.metadata.PackageNotFoundError(name)
        return known[name]

    return installed


@pytest.mark.parametrize(
    ("version", "verdict"),
    [((3, 10, 9), "fail"), ((3, 11, 0), "ok"), ((3, 12, 7), "ok"), ((3, 13, 0), "fail"), ((2, 7, 18), "fail")],
)
def test_python_must_be_311_or_312(version: tuple[int, ...], verdict: str) -> None:
    assert check_python(version).verdict == verdict


def test_packages_that_are_missing_or_out_of_range_are_named_with_the_command_that_mends_them() -> None:
    stated = ["torch>=2.13", "ray[train]>=2.60,<3", "absent>=1", "build; extra == 'dev'", "old; python_version < '3'"]
    rows = check_requirements(stated, versions(torch="2.12.1+cpu", ray="2.61.0"))
    assert [(row.check, row.verdict) for row in rows] == [("torch", "fail"), ("absent", "fail")]
    assert rows[0].found == "2.12.1+cpu, wanted >=2.13"
    assert rows[0].mend == "pip install 'torch>=2.13'"
    assert "not installed" in rows[1].found


def test_a_local_build_of_a_version_counts_as_that_version() -> None:
    [row] = check_requirements(["torch>=2.13"], versions(torch="2.13.0+cpu"))
    assert (row.verdict, row.found) == ("ok", "1 within their ranges")
    assert check_requirements([], versions())[0].verdict == "warn"


@pytest.mark.parametrize(("free", "verdict"), [(GIB // 2, "fail"), (2 * GIB, "warn"), (50 * GIB, "ok")])
def test_little_disk_is_a_warning_and_none_a_failure(free: int, verdict: str) -> None:
    row = check_disk(free)
    assert row.verdict == verdict
    assert bool(row.mend) == (verdict != "ok")


@pytest.mark.parametrize(("total", "verdict"), [(2 * GIB, "warn"), (24 * GIB, "ok")])
def test_little_memory_is_a_warning(total: int, verdict: str) -> None:
    assert check_memory(total).verdict == verdict


def test_the_memory_found_is_not_more_than_the_machine_has() -> None:
    meminfo = Path("/proc/meminfo").read_text().split()
    assert 0 < doctor._memory_bytes() <= int(meminfo[1]) * 1024


def test_a_hidden_standard_module_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._check_platform_module().verdict == "ok"
    hiding = types.ModuleType("platform")
    hiding.__file__ = "/somewhere/platform/__init__.py"
    monkeypatch.setattr(doctor, "platform", hiding)
    row = doctor._check_platform_module()
    assert row.verdict == "fail"
    assert "/somewhere/platform/__init__.py" in row.found


def test_a_missing_compiler_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    row = doctor._check_compiler()
    assert row.verdict == "fail"
    assert row.found.startswith("g++ not found")  # ninja is beside our python


def test_a_store_that_cannot_be_written_is_a_row_that_names_the_setting() -> None:
    for tracking in (
        TrackingSettings(root="s3://bucket/runs"),
        TrackingSettings(uri="http://127.0.0.1:1"),
        TrackingSettings(root="/proc/no/such/folder"),
    ):
        row = doctor._check_store(tracking)
        assert row.verdict in ("fail", "warn"), row  # warn: late on a busy machine
        assert "tracking." in row.mend


def test_the_store_is_tried_without_leaving_anything_behind(tmp_path: Path) -> None:
    row = doctor._check_store(TrackingSettings(root=str(tmp_path / "runs" / "mlflow")))
    assert row.verdict in ("ok", "warn"), row  # warn: a busy machine
    assert str(tmp_path / "runs" / "mlflow") in row.found
    assert list(tmp_path.iterdir()) == []


def test_a_probe_reports_the_last_line_of_what_went_wrong() -> None:
    answer = doctor._run_probe(["import sys; print('noise', file=sys.stderr); raise SystemExit('no room left')"])
    assert (answer.is_right, answer.problem) == (False, "no room left")
    assert doctor._run_probe(["raise SystemExit(3)"]).problem == "ended with exit code 3"
    assert doctor._run_probe(["print('answer', 6 * 7)"]).is_right


@pytest.mark.parametrize(("load", "is_excused"), [(0.1, False), (1e6, True)])
def test_a_probe_that_hangs_is_ended_at_the_deadline(
    load: float, is_excused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_DEADLINE_S", 0.2)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, load, load))
    answer = doctor._run_probe(["import time; time.sleep(600)"])
    assert "no answer within 0.2 s" in answer.problem
    assert answer.is_excused == is_excused


def test_the_report_is_healthy_unless_something_failed() -> None:
    warned = DoctorReport((Row("disk", "warn", "2 GiB free", "free some"), Row("ray", "ok", "starts")))
    assert warned.is_healthy
    assert warned.to_text() == "warn disk  2 GiB free\n           → free some\nok   ray   starts"
    failed = DoctorReport((*warned.rows, Row("x", "fail", "no", "do")))
    assert not failed.is_healthy
    assert json.loads(json.dumps(failed.to_json_dict()))["rows"][2] == {
        "check": "x",
        "verdict": "fail",
        "found": "no",
        "mend": "do",
    }


def test_this_machine_can_run_the_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = diagnose()
    assert report.is_healthy, report.to_text()
    assert {row.check for row in report.rows} >= {
        "python", "pixellm", "packages", "import platform", "devices", "compiler", "disk", "memory", "ray", "mlflow"
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_the_rows_as_json(tmp_path: Path) -> None:
    code = (
        "from pixellm.jobs import doctor\n"
        "doctor._check_ray = lambda: doctor.Row('ray', 'fail', 'does not start', 'mend it')\n"
        "import sys; sys.argv = ['pixellm', 'doctor', '--json']\n"
        "from pixellm.cli import main; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert {"check": "ray", "verdict": "fail", "found": "does not start", "mend": "mend it"} in json.loads(done.stdout)[
        "rows"
    ]
