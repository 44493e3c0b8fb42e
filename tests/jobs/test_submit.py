"""Jobs on a real cluster: a head of our own that wants a token, and the command line as a user runs it."""

import http.server
import json
import platform
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from pixellm.errors import ClusterError, ConfigError
from pixellm.jobs import job_client, submit
from pixellm.platform import registry
from pixellm.platform.settings import TrackingSettings
from pixellm.platform.tracking import connect_store, store_address
from tests.cluster.own_cluster import Head, free_ports, own_cluster

_DEADLINE_S = 240


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    """A head with a token, in a temporary folder of its own."""
    with own_cluster() as started:
        yield started


@pytest.fixture
def pixellm(head: Head, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `pixellm WORDS --address URL` in a folder that is not the checkout."""

    def run(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "pixellm.cli", *words, "--address", head.url],
            cwd=tmp_path,
            env=head.environment | variables,
            capture_output=True,
            text=True,
            check=False,
            timeout=_DEADLINE_S,
        )

    return run


def python(code: str, head: Head, cwd: Path, *arguments: str) -> str:
    """Runs a program that finds the dashboard's URL and the control store's address in its arguments."""
    done = subprocess.run(
        [sys.executable, "-c", code, head.url, head.address, *arguments],
        cwd=cwd,
        env=head.environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=_DEADLINE_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.drill  # a training with its own head: three to four minutes; tests/cluster does it on two nodes
def test_submit_train_from_another_folder_ends_with_a_registered_version(
    pixellm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    short = ["--train.steps=2", "--train.num_workers=1", "--train.micro_batch_size=1", "--evaluate.limit=1"]
    done = pixellm("submit", "train", "--config", "recipes/tiny.yaml", *short, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "registered as version 1" in done.stdout
    tracking = TrackingSettings(root=str(tmp_path / "runs" / "mlflow"))
    version = registry.look_up("models:/pixellm@candidate", tracking)
    assert (registry.resolve(version.reference, tracking) / "model.safetensors").is_file()
    run = connect_store(store_address(tracking)).get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["pixellm.wheel_digest"]  # it ran from the wheel, and knows the commit that it was built from
    assert run.data.tags["mlflow.source.git.commit"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


_LOOK = """
import contextlib, dataclasses, io, json, sys
from pixellm.errors import ClusterError
from pixellm.jobs import submit
url, job_id = sys.argv[1], sys.argv[3]
logs = io.StringIO()
with contextlib.redirect_stdout(logs):
    submit.print_logs(job_id, url)
try:
    submit.job_status("raysubmit_unknown", url)
except ClusterError as error:
    unknown = str(error)
jobs = submit.list_jobs(url)
print(json.dumps({
    "row": [dataclasses.asdict(row) for row in jobs.jobs if row.job_id == job_id][0],
    "text": jobs.to_text(),
    "status": submit.job_status(job_id, url),
    "logs": logs.getvalue(),
    "stop": submit.stop_job(job_id, url),
    "unknown": unknown,
}))
"""


def test_the_exit_code_of_the_job_is_the_exit_code_of_submit_and_the_job_can_be_looked_at_later(
    head: Head, pixellm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = pixellm("submit", "models", "show", "not-a-reference", "--wait")
    assert done.returncode == 1, done.stderr
    assert "error: 'not-a-reference' is not models:/NAME@alias or models:/NAME/VERSION" in done.stdout, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    job_id = done.stdout.split()[1]
    assert f"job {job_id} failed (exit code 1)" in done.stdout
    seen = json.loads(python(_LOOK, head, tmp_path, job_id))
    row = seen["row"]
    assert (row["status"], row["exit_code"], row["command"]) == ("FAILED", 1, "models show not-a-reference")
    assert f"{job_id}  FAILED     models show not-a-reference" in seen["text"]
    assert seen["status"] == "FAILED (exit code 1)"
    assert "error: 'not-a-reference' is not" in seen["logs"]
    assert seen["stop"] == f"job {job_id} had ended: FAILED"
    assert "raysubmit_unknown does not exist" in seen["unknown"]


_STOP = """
import shlex, sys, time
from pathlib import Path
from pixellm.jobs import job_client, submit
from pixellm.jobs.submission import plan_submission
program = '''
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background inherits SIG_IGN
try:
    print("running", flush=True)
    time.sleep(600)
except KeyboardInterrupt:
    print("checkpoint")
'''
variables = plan_submission(["doctor"], caller_dir=Path.cwd(), is_head_local=True).env_vars
client = job_client.open_client(sys.argv[1])
command = f"exec {sys.executable} -c {shlex.quote(program)}"
job_id = client.submit_job(entrypoint=command, runtime_env={"env_vars": variables})
deadline = time.monotonic() + 200
while "running\\n" not in client.get_job_logs(job_id):
    assert time.monotonic() < deadline
    time.sleep(0.2)
assert submit.job_status(job_id, sys.argv[1]) == "RUNNING"
assert submit.stop_job(job_id, sys.argv[1]) == f"job {job_id} STOPPED"
submit.print_logs(job_id, sys.argv[1], follow=True)
"""


def test_stop_is_a_ctrl_c_that_the_job_may_finish_up_after(head: Head, tmp_path: Path) -> None:
    assert python(_STOP, head, tmp_path).splitlines()[-2:] == ["running", "checkpoint"]


_DRIVER = """
import sys, platform
import pixellm, ray
from pixellm.platform.cluster import connect, disconnect
from pixellm.platform.settings import ClusterSettings
info = connect(ClusterSettings(address=sys.argv[2]))
assert not info.is_ours and info.num_cpus == 4, info
@ray.remote
def where():
    import pixellm, platform
    from pixellm.platform.version import checkout_folder, code_version
    return pixellm.__file__, str(checkout_folder()), code_version().commit, platform.system()
file, checkout, commit, system = ray.get(where.remote())
assert file != pixellm.__file__ and "py_modules" in file, file
assert checkout == "None" and commit, (checkout, commit)
disconnect()
print(system)
"""


def test_a_driver_that_joins_by_address_brings_its_code_as_a_wheel(head: Head, tmp_path: Path) -> None:
    assert python(_DRIVER, head, tmp_path).strip() == platform.system()


_TRAP = """
import sys
from pixellm.jobs.job_client import JobHandle, open_client, submit_job
code = "import platform, ray; print(platform.system()); ray.init(); "
task = "print(ray.get(ray.remote(lambda: __import__('platform').system()).remote()))"
client = open_client(sys.argv[1])
environment = {"working_dir": sys.argv[3]}
job = JobHandle(client, submit_job(client, entrypoint=f'{sys.executable} -c "{code}{task}"', runtime_env=environment))
code = job.wait(200)
print(job.logs())
sys.exit(code)
"""


def test_a_job_whose_working_directory_has_our_layout_finds_the_standard_platform_module(
    head: Head, tmp_path: Path
) -> None:
    layout = tmp_path / "layout"
    for name in ("model", "platform", "jobs", "serve"):
        (layout / name).mkdir(parents=True)
        (layout / name / "settings.py").write_text("")
    printed = python(_TRAP, head, tmp_path, str(layout)).splitlines()
    assert printed.count(platform.system()) == 2, printed  # by the driver and by a task


@pytest.mark.parametrize(
    ("token", "said"), [("f" * 64, "refuses our token; set RAY_AUTH_MODE"), ("", "wants a token; set RAY_AUTH_MODE")]
)
def test_a_wrong_or_missing_token_is_refused_in_one_line(
    token: str, said: str, pixellm: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = pixellm("submit", "doctor", RAY_AUTH_TOKEN=token, HOME=str(tmp_path))  # Ray looks for a token there too
    assert done.returncode == 1
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Without a cluster


def test_where_nothing_answers_the_error_says_how_to_start_a_cluster() -> None:
    [port] = free_ports(1)
    with pytest.raises(ClusterError, match=rf"127\.0\.0\.1:{port} .*ray start"):
        submit.submit(["train"], address=f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("address", ["127.0.0.1:8265", "ray://h:1", "http://"])
def test_an_address_that_is_no_dashboard_is_wrong_usage(address: str) -> None:
    with pytest.raises(ConfigError, match="http://HEAD:8265"):
        submit.list_jobs(address)


def test_no_address_at_all_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="--address"):
        submit.submit(["train"])


def test_a_server_that_is_not_rays_is_recognised() -> None:
    class NotRay(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NotRay)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ClusterError, match="is not a Ray dashboard"):
            submit.list_jobs(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


class BrokenLogs:
    """A job whose log stream breaks off twice and starts anew each time, as Ray's does."""

    def __init__(self) -> None:
        self.num_calls = 0

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        self.num_calls += 1
        lines = ["one\n", "two\n", "three\n", "four\n"]
        for line in lines[: 1 + self.num_calls]:
            yield line
        if self.num_calls < 3:
            raise RuntimeError("connection closed")

    def get_job_status(self, job_id: str) -> object:
        status = "RUNNING" if self.num_calls < 3 else "SUCCEEDED"
        return type("Status", (), {"value": status})()

    def get_job_info(self, job_id: str) -> object:
        return type("Details", (), {"status": self.get_job_status(job_id), "driver_exit_code": 0})()


def test_following_over_a_broken_connection_prints_each_line_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert job_client.JobHandle(BrokenLogs(), "j").follow() == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"
