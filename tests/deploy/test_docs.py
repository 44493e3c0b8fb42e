"""The documentation builds without a broken link, and what it says to type is what the command line takes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from command_check import problem_with

import pixellm

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
# `pixellm` commands that need nothing but the checkout: run as they are written, in this order.
QUICK = (
    "pixellm key ann",
    "pixellm train --config recipes/pixellm-7b.yaml --dry-run",
    "pixellm train --config recipes/lisa-7b.yaml --dry-run",
    "pixellm train --config recipes/tiny.yaml --train.lr=1e-4 --dry-run",
)
SLOWER = (
    "pixellm data prepare shapes --out shards/ --samples 64",
    "pixellm data stats shards/",
    "pixellm data show shards/ --out sheet.png",
    "pixellm flops --preset pixellm-7b --against lisa-7b",
)
# `python -m` modules and programs of others: named, not run here.
_OTHERS = {
    *("make", "source", "curl", "docker", "kubectl", "ray", "serve", "mlflow", "cp", "sqlite3", "export", "openssl"),
    *("python", ".venv/bin/ray", "cat", "head", "git"),
}


def commands_of(page: Path) -> list[str]:
    """The lines of its bash blocks, continued ones joined, comments gone; assignments before a command too."""
    blocks = re.findall(
        r"^```(?:bash|sh|console)\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.match(r"^[A-Z_]+=", words[0]):
            words = words[1:]
        if words:
            found.append(shlex.join(words))
    return found


def ours() -> list[tuple[str, str]]:
    """(page, command) of every `pixellm` command that is written without an ellipsis."""
    pairs = []
    for page in PAGES:
        for command in commands_of(page):
            if command.startswith("pixellm "):
                pairs.append((str(page.relative_to(REPOSITORY)), command))
    return pairs


@pytest.mark.parametrize(("page", "command"), ours())
def test_every_command_of_ours_is_one_that_the_command_line_takes(page: str, command: str) -> None:
    assert problem_with(shlex.split(command)) is None


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("pixellm dato stats shards/", "no such command"),
        ("pixellm data stats shards/ --plott x.png", "plott"),
        ("pixellm train --config recipes/tiny.yaml --train.lrr=1", "train.lr"),
        ("pixellm train --config recipes/none.yaml", "none.yaml"),
        ("pixellm submit train --config recipes/tiny.yaml --train.stepz=1", "train.steps"),
    ],
)
def test_a_wrong_command_would_be_caught(command: str, complaint: str) -> None:
    assert complaint in str(problem_with(shlex.split(command)))


def test_every_other_command_is_of_a_program_that_we_know() -> None:
    for page in PAGES:
        for command in commands_of(page):
            words = shlex.split(command)
            assert words[0] == "pixellm" or words[0] in _OTHERS, (page.name, command)
            if words[:2] == ["python", "-m"] and words[2].split(".")[0] in ("benchmarks", "pixellm"):
                assert (REPOSITORY / words[2].replace(".", "/")).with_suffix(".py").exists(), command
            if words[0] == "make":
                targets = [word for word in words[1:] if "=" not in word]
                assert all(re.search(rf"^{t}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE) for t in targets)


def test_tests_that_pages_name_exist() -> None:
    """`python -m pytest FILE -k "A or B"`: each of the words selects a test of the file."""
    named = 0
    for page in PAGES:
        for command in commands_of(page):
            words = shlex.split(command)
            if words[:3] == ["python", "-m", "pytest"] and not words[3].startswith("-"):
                tests = re.findall(
                    r"^def (test_\w+)", (REPOSITORY / words[3]).read_text(encoding="utf-8"), re.MULTILINE
                )
                chosen = words[words.index("-k") + 1].split(" or ") if "-k" in words else [""]
                named += len(chosen)
                assert all(any(part in test for test in tests) for part in chosen), (page.name, command)
    assert named >= 3


def test_the_api_page_shows_every_public_name() -> None:
    shown = re.findall(r"^::: (\S+)$", (REPOSITORY / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {f"pixellm.{name}" for name in pixellm.__all__} == {
        name for name in shown if re.match(r"pixellm\.[A-Z]", name)
    }


def test_benchmarks_that_pages_name_exist() -> None:
    for page in PAGES:
        for module in re.findall(r"python -m (benchmarks\.\w+)", page.read_text(encoding="utf-8")):
            assert (REPOSITORY / f"{module.replace('.', '/')}.py").exists(), (page.name, module)


def test_files_that_pages_name_exist() -> None:
    """Paths in backticks that begin with one of our folders; `…` and capitals stand for something else."""
    folders = "|".join(["model", "platform", "jobs", "serve", "pixellm", "recipes", "tests", "benchmarks", "deploy"])
    named = 0
    for page in PAGES:
        for path in re.findall(rf"`((?:{folders})/[a-z0-9_./-]*)`", page.read_text(encoding="utf-8")):
            named += 1
            assert (REPOSITORY / path).exists(), (page.name, path)
    assert named > 40


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#]+)", text)
    assert len(targets) > 5
    assert [t for t in targets if not t.startswith("http") and not (REPOSITORY / t).exists()] == []


def test_the_pages_build_strictly(tmp_path: Path) -> None:
    mkdocs = Path(sys.executable).with_name("mkdocs")
    built = subprocess.run(
        [mkdocs, "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr
    for page in PAGES[1:]:
        place = page.relative_to(REPOSITORY / "docs").with_suffix("")
        html = tmp_path / "site" / ("index.html" if place.name == "index" else f"{place}/index.html")
        assert "<h1" in html.read_text(encoding="utf-8")


def test_quick_commands_run_as_they_are_written(tmp_path: Path) -> None:
    run_as_written(QUICK, tmp_path)


@pytest.mark.drill
def test_the_tour_of_the_data_runs_as_it_is_written(tmp_path: Path) -> None:
    run_as_written(SLOWER, tmp_path)
    assert (tmp_path / "sheet.png").stat().st_size > 10_000


def run_as_written(commands: tuple[str, ...], folder: Path) -> None:
    written = {command for _, command in ours()}
    (folder / "recipes").symlink_to(REPOSITORY / "recipes")
    for command in commands:
        assert command in written, f"no page says {command}"
        words = shlex.split(command)
        done = subprocess.run(
            [Path(sys.executable).with_name(words[0]), *words[1:]],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
