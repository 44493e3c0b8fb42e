"""A head and a second raylet that want a token, and `pixellm` from an installed wheel in another folder."""

import json
import re
import subprocess
import sys
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pixellm.platform import registry
from pixellm.platform.settings import TrackingSettings
from pixellm.platform.wheel import build_wheel
from tests.cluster.own_cluster import Head, free_ports, own_cluster

pytestmark = pytest.mark.drill

_DEADLINE_S = 270
_SHORT = ["--train.micro_batch_size=1", "--evaluate.limit=1", "--registry.promote=false"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """Two nodes of two logical CPUs."""
    with own_cluster(head_cpus=2, nodes=(2,)) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the code, unpacked as pip does."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(build_wheel(tmp_path_factory.mktemp("wheel"))) as wheel:
        wheel.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the user stands."""
    return tmp_path_factory.mktemp("user")


@pytest.fixture
def pixellm(head: Head, installed: Path, here: Path) -> Run:
    """Runs `pixellm WORDS --address URL` from the installed wheel."""

    def run(*words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-P", "-m", "pixellm.cli", *words, "--address", head.url],
            cwd=here,
            env=head.environment | {"PYTHONPATH": str(installed)} | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=_DEADLINE_S,
        )

    return run


def _wait(is_true: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _DEADLINE_S
    while not is_true():
        assert time.monotonic() < deadline, what
        time.sleep(0.5)


def _job_id(printed: str) -> str:
    found = re.search(r"job (\S+) submitted", printed)
    assert found, printed
    return found[1]


def test_a_wrong_token_is_refused_in_one_line(pixellm: Run) -> None:
    done = pixellm("submit", "doctor", RAY_AUTH_TOKEN="f" * 64)
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "refuses our token; set RAY_AUTH_MODE" in done.stderr


def test_a_secret_that_the_cluster_lacks_ends_the_job_with_its_name(pixellm: Run) -> None:
    done = pixellm("submit", "models", "list", "--secret", "ABSENT_API_KEY", "--wait")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the job wants ABSENT_API_KEY, which the cluster does not hold" in done.stdout


def test_training_evaluation_and_prediction_run_where_the_cluster_is(pixellm: Run, here: Path, demo_data: Path) -> None:
    done = pixellm("submit", "train", "--config", "recipes/demo.yaml", "--train.steps=4", *_SHORT, "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered as version 1" in done.stdout
    assert f"/#/jobs/{_job_id(done.stdout)}" in done.stdout
    version = registry.look_up("models:/pixellm@candidate", TrackingSettings(root=str(here / "runs" / "mlflow")))
    assert version.version == 1
    shards = next(here.glob("runs/*/data/demo/muse"))
    words = ["--model", "models:/pixellm/1", "--limit", "2", "--actors", "2", "--batch-size", "1"]
    done = pixellm("submit", "evaluate", "--suite", "muse", "--data", str(shards), *words, "--out", "eval", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((here / "eval" / "metrics.json").read_text())["questions"] == 2
    words = ["--in", str(demo_data / "images"), "--out", "answers", "--model", "models:/pixellm/1", "--actors", "2"]
    done = pixellm("submit", "predict", "Segment the cat.", *words, "--max-new-tokens", "4", "--follow")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((here / "answers" / "summary.json").read_text())
    assert summary["answered"] == summary["inputs"] == len(list((demo_data / "images").iterdir()))


def test_a_stopped_training_leaves_a_checkpoint_and_the_same_command_goes_on(pixellm: Run, here: Path) -> None:
    command = ["submit", "train", "--config", "recipes/tiny.yaml", "--name=stopped", *_SHORT]
    job_id = _job_id(pixellm(*command, "--train.steps=400", "--train.checkpoint_every=400").stdout)
    _wait(lambda: bool(re.search(r"step [1-9]", pixellm("jobs", "logs", job_id).stdout)), "no step was done")
    assert pixellm("jobs", "stop", job_id).stdout.strip() == f"job {job_id} STOPPED"
    said = pixellm("jobs", "logs", job_id).stdout
    reached = re.search(r"stopped after step (\d+); checkpoint", said)
    assert reached, said
    steps = int(reached[1]) + 2
    done = pixellm(*command, f"--train.steps={steps}", "--train.checkpoint_every=400", "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"trained {steps} steps" in done.stdout


def test_a_submitted_service_answers_until_it_is_stopped(pixellm: Run) -> None:
    [port] = free_ports(1)
    done = pixellm("submit", "serve", "--model", "models:/pixellm/1", "--port", str(port))
    job_id = _job_id(done.stdout)

    def is_ready() -> bool:
        assert "FAILED" not in pixellm("jobs", "status", job_id).stdout, pixellm("jobs", "logs", job_id).stdout
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    _wait(is_ready, "the service does not come up")
    assert pixellm("jobs", "stop", job_id).stdout.strip() == f"job {job_id} STOPPED"
