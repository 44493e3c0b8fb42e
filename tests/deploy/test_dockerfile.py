"""The Dockerfile, as far as it can be judged without building it: a linter, and what its lines refer to."""

import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def lines(repository: Path) -> list[str]:
    """Its instructions, continued lines joined, comments gone."""
    text = (repository / "Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_linter_finds_nothing(repository: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([hadolint, repository / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_the_linter_would_object_to_root_and_unpinned_installs(tmp_path: Path) -> None:
    bad = tmp_path / "Dockerfile"
    bad.write_text("FROM python\nRUN pip install torch\nUSER root\n")
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), bad], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert {"DL3006", "DL3002", "DL3013"} <= set(re.findall(r"DL\d+", done.stdout))


def test_what_it_copies_exists_and_is_let_in(lines: list[str], repository: Path) -> None:
    allowed = {line[1:] for line in (repository / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [
        source for line in lines if line.startswith("COPY ") and "--from=" not in line for source in line.split()[1:-1]
    ]
    assert {"constraints.txt", "requirements.lock", "pixellm", "model"} <= set(copied)
    for source in copied:
        assert (repository / source).exists()
        assert source.split("/")[0] in allowed
    assert allowed == {source.split("/")[0] for source in copied}


def test_every_target_ends_without_root_and_installs_by_hashes_or_constraints(lines: list[str]) -> None:
    stages: dict[str, list[str]] = {}
    for line in lines:
        if line.startswith("FROM "):
            base, name = re.match(r"FROM (\S+) AS (\S+)", line).groups()  # type: ignore[union-attr]
            stages[name] = list(stages.get(base, []))
        else:
            stages[name].append(line)
    for target in ("cpu", "cuda"):
        users = [line.split()[1] for line in stages[target] if line.startswith("USER ")]
        assert users == ["1000"]
    assert list(stages)[-1] == "cpu"
    for line in lines:
        for install in re.findall(r"pip (?:install|wheel)[^&]*", line):
            assert re.search("--require-hashes|--constraint constraints.txt|--no-index", install)
    assert any("--require-hashes --no-deps --requirement requirements.lock" in line for line in stages["dependencies"])


def test_its_python_is_the_one_of_the_cluster_images(lines: list[str], repository: Path) -> None:
    minor = re.search(r"FROM python:3\.(\d+)", lines[0]).group(1)  # type: ignore[union-attr]
    assert f"-py3{minor}-" in (repository / "cluster.yaml").read_text(encoding="utf-8")
