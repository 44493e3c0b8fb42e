"""What is installed, from what files, and under which licences: the locks, the licence page and the audit's verdict."""

import json
import re
import runpy
import tomllib
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REPOSITORY = Path(__file__).resolve().parents[1]
RUNTIME, DEV = "requirements.lock", "requirements-dev.lock"


def pins(name: str) -> dict[str, str]:
    """Package → version of a lock or of constraints.txt."""
    text = (REPOSITORY / name).read_text(encoding="utf-8")
    return {
        canonicalize_name(package): version for package, version in re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE)
    }


def needed_at_run_time() -> set[str]:
    """The installed packages that pixellm's dependencies and the extra `tracking` lead to, by their metadata."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    todo = [Requirement(line) for line in project["dependencies"] + project["optional-dependencies"]["tracking"]]
    seen: set[tuple[str, str]] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                lines = requires(requirement.name) or []
            except PackageNotFoundError:  # the extra is not installed by `make setup-dev`
                continue
            found = [Requirement(line) for line in lines]
            todo += [r for r in found if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def licence_table() -> list[tuple[str, str, str]]:
    """The rows of docs/licences.md."""
    page = (REPOSITORY / "docs" / "licences.md").read_text(encoding="utf-8")
    return re.findall(r"^\| ([a-z0-9-]+) \| (\d\S*) \| (.*) \|$", page, re.MULTILINE)


@pytest.mark.parametrize("lock", [RUNTIME, DEV, "tools/release.lock"])
def test_every_locked_package_has_hashes(lock: str) -> None:
    text = (REPOSITORY / lock).read_text(encoding="utf-8")
    entries = re.findall(r"^[^#\s].*(?:\n +.*)*", text, re.MULTILINE)
    assert len(entries) == len(pins(lock)) > 40
    assert all(re.search(r" --hash=sha256:[0-9a-f]{64}\b", entry) for entry in entries)


def test_the_locks_hold_the_pins_of_the_constraints_and_each_once() -> None:
    runtime, dev, constraints = pins(RUNTIME), pins(DEV), pins("constraints.txt")
    assert not set(runtime) & set(dev)
    runtime.pop("setuptools")  # a dependency that comes first and is not pinned there
    constraints.pop("torch")  # from another index
    assert runtime | dev == constraints, "constraints.txt has changed: run `make lock` and `make licences`"


def test_what_runs_is_locked_apart_from_what_only_developers_need() -> None:
    needed = needed_at_run_time() & (set(pins("constraints.txt")) | {"setuptools"})
    assert needed - {"torch"} <= set(pins(RUNTIME))
    assert not needed & set(pins(DEV))


def test_the_lock_knows_what_torch_needs_without_cuda() -> None:
    (torch,) = tomllib.loads((REPOSITORY / "tools" / "uv.toml").read_text(encoding="utf-8"))["dependency-metadata"]
    installed = [Requirement(line) for line in requires("torch") or []]
    without_cuda = {
        str(r)
        for r in installed
        if not (r.marker and "extra" in str(r.marker)) and not r.name.startswith(("nvidia-", "cuda-", "triton"))
    }
    assert set(torch["requires-dist"]) == without_cuda


def test_every_package_of_the_lock_has_a_licence_listed() -> None:
    listed = {name: version for name, version, _ in licence_table()}
    assert listed == pins(RUNTIME) | {"torch": pins("constraints.txt")["torch"]}, "run `make licences`"


def test_no_listed_licence_is_one_that_users_could_not_live_with() -> None:
    is_denied = runpy.run_path(str(REPOSITORY / "tools" / "licences.py"))["is_denied"]
    assert [row for row in licence_table() if is_denied(row[2])] == []


@pytest.mark.parametrize(
    ("licence", "denied"),
    [
        ("AGPL-3.0-only", True),
        ("GNU Affero General Public License v3", True),
        ("SSPL-1.0", True),
        ("BUSL-1.1", True),
        ("CC-BY-NC-4.0", True),
        ("MIT AND LicenseRef-NonCommercial", True),
        ("UNKNOWN", True),
        ("GPLv2", False),
        ("GNU Library or Lesser General Public License (LGPL)", False),
        ("Mozilla Public License 2.0 (MPL 2.0)", False),
        ("Apache-2.0 OR BSD-3-Clause", False),
    ],
)
def test_network_copyleft_and_non_commercial_licences_are_denied(licence: str, denied: bool) -> None:
    assert runpy.run_path(str(REPOSITORY / "tools" / "licences.py"))["is_denied"](licence) is denied


FINE = {"name": "rich", "version": "15.0.0", "vulns": []}
BAD = FINE | {"vulns": [{"id": "PYSEC-1", "aliases": ["CVE-1"], "fix_versions": ["15.0.1"]}]}
SKIPPED = {"name": "rich", "skip_reason": "not found"}
NO_NAME = "requests.exceptions.ConnectionError: Failed to resolve 'api.osv.dev'"


@pytest.mark.parametrize(
    ("returncode", "packages", "stderr", "status", "said"),
    [
        (0, [FINE], "", 0, "no known vulnerability in 1 packages"),
        (1, [BAD], "", 1, "rich 15.0.0: PYSEC-1, CVE-1; mended in 15.0.1"),
        (0, [SKIPPED], "", 2, "skipped rich"),
        (1, None, NO_NAME, 3, "NOT AUDITED"),
        (2, None, "unrecognized arguments", 2, "unrecognized"),
        (0, None, "", 2, "failed"),
    ],
)
def test_only_a_finished_audit_says_that_nothing_is_vulnerable(
    returncode: int, packages: list | None, stderr: str, status: int, said: str
) -> None:
    verdict = runpy.run_path(str(REPOSITORY / "tools" / "audit.py"))["verdict"]
    got = verdict(returncode, "" if packages is None else json.dumps({"dependencies": packages}), stderr)
    assert got[0] == status
    assert said in got[1]
