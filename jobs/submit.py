"""Jobs on a cluster, through Ray's job server: submit a pixellm command, follow it, list, stop.

A job is the wheel of the code that is running here, a small working directory with the resolved recipe, and one shell
command (`pixellm.jobs.submission`). Its exit code is this command's exit code.
"""

import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pixellm.jobs.cluster_state import check_python, waiting_is_said
from pixellm.jobs.job_client import (
    ENDED,
    EXIT_STOPPED,
    JobHandle,
    cluster_errors,
    dashboard_url,
    is_head_here,
    open_client,
    submit_job,
)
from pixellm.jobs.submission import Submission, parse_submit_words, plan_submission, refuse_secrets
from pixellm.platform.cluster import runtime_env
from pixellm.platform.settings import from_environment
from pixellm.platform.wheel import build_wheel


@dataclass(frozen=True)
class JobRow:
    """One job of a cluster, as `jobs list` shows it."""

    job_id: str
    status: str
    command: str
    start_ms: int | None
    end_ms: int | None
    exit_code: int | None


@dataclass(frozen=True)
class JobList:
    """The submitted jobs of a cluster, newest first."""

    address: str
    jobs: tuple[JobRow, ...]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"address": self.address, "jobs": [vars(job) for job in self.jobs]}

    def to_text(self) -> str:
        """One line per job."""
        if not self.jobs:
            return f"no jobs at {self.address}"
        return "\n".join(f"{job.job_id}  {job.status:<9}  {job.command}" for job in self.jobs)


def submit(command: Sequence[str], *, address: str | None = None, secrets: Sequence[str] = ()) -> JobHandle:
    """Submits a pixellm command to a cluster.

    Args:
        command: the words after `pixellm`, e.g. ["train", "--config", "recipes/tiny.yaml", "--train.steps=100"].
        address: the cluster's dashboard, http://host:port; None: `RAY_API_SERVER_ADDRESS` or `RAY_ADDRESS`.
        secrets: names of variables that the job needs and the cluster holds; only the names travel.

    Returns:
        The job; it runs whether or not anybody waits for it.

    Raises:
        ConfigError: the address, the recipe or a path in it cannot be used, or a secret stands in them.
        ClusterError: nothing answers there, it refuses us or runs another Python, or the wheel cannot be built.
    """
    url = dashboard_url(address)
    client = open_client(url)
    check_python(url)
    plan = plan_submission(command, caller_dir=Path.cwd(), is_head_local=is_head_here(url), secrets=secrets)
    refuse_secrets(plan, os.environ)
    with tempfile.TemporaryDirectory(prefix="pixellm-submit-") as scratch:
        working_dir = Path(scratch) / "job"
        working_dir.mkdir()
        for name, text in plan.files.items():
            (working_dir / name).write_text(text, encoding="utf-8")
        wheel = build_wheel(Path(scratch) / "wheel")
        return JobHandle(client, _submit(client, plan, wheel, working_dir))


def submit_from_command_line(words: Sequence[str], *, address: str | None = None) -> int:
    """`pixellm submit WORDS`: submits, prints the job id, and with `--wait` follows the job.

    Returns:
        Exit code: the job's with `--wait`, else 0.

    Raises:
        ConfigError, ClusterError: as `submit`.
    """
    options = parse_submit_words(words)
    url = dashboard_url(options.address or address)
    job = submit(options.command, address=url, secrets=options.secrets)
    print(f"job {job.job_id} submitted to {url}\ndashboard: {url}/#/jobs/{job.job_id}", flush=True)
    store = from_environment().get("MLFLOW_TRACKING_URI")
    print(f"MLflow: {store or 'tracking.root of the recipe (mlflow ui --backend-store-uri …)'}", flush=True)
    if not options.wait:
        print(f"follow it: pixellm jobs logs {job.job_id} --follow --address {url}", flush=True)
        return 0
    try:
        with waiting_is_said(url):
            code = job.follow()
    except KeyboardInterrupt:
        print(f"\nthe job runs on; stop it: pixellm jobs stop {job.job_id} --address {url}", flush=True)
        return EXIT_STOPPED
    status = job.status()
    print(f"job {job.job_id} {status.lower()}" + ("" if status == "SUCCEEDED" else f" (exit code {code})"), flush=True)
    if status == "FAILED" and not job.logs().strip():
        print(job.message(), file=sys.stderr)  # it never started: only Ray knows why
    return code


def list_jobs(address: str | None) -> JobList:
    """The submitted jobs of a cluster, newest first.

    Raises:
        ClusterError: the cluster does not answer.
    """
    url = dashboard_url(address)
    client = open_client(url)
    with cluster_errors("the list of jobs"):
        found = [details for details in client.list_jobs() if details.submission_id]
    rows = [
        JobRow(
            details.submission_id,
            details.status.value,
            (details.metadata or {}).get("pixellm.command") or details.entrypoint,
            details.start_time,
            details.end_time,
            details.driver_exit_code,
        )
        for details in found
    ]
    return JobList(url, tuple(sorted(rows, key=lambda row: -(row.start_ms or 0))))


def job_status(job_id: str, address: str | None) -> str:
    """The state of a job in one line.

    Raises:
        ClusterError: the cluster does not answer, or has no such job.
    """
    job = JobHandle.open(job_id, address)
    status = job.status()
    return f"{status} (exit code {job.exit_code()})" if status == "FAILED" else status


def print_logs(job_id: str, address: str | None, *, follow: bool = False) -> None:
    """Prints what a job printed, until it ends with `follow`.

    Raises:
        ClusterError: the cluster does not answer, or has no such job.
    """
    job = JobHandle.open(job_id, address)
    if follow:
        job.follow()
    else:
        print(job.logs(), end="", flush=True)


def stop_job(job_id: str, address: str | None) -> str:
    """Asks a job to stop and waits until it has; training leaves a checkpoint. Returns one line on what happened.

    Raises:
        ClusterError: the cluster does not answer, or has no such job.
    """
    job = JobHandle.open(job_id, address)
    before = job.status()
    if before in ENDED:
        return f"job {job_id} had ended: {before}"
    job.stop()
    job.wait()
    return f"job {job_id} {job.status()}"


def _submit(client: Any, plan: Submission, wheel: Path, working_dir: Path) -> str:
    with cluster_errors("the submission"):
        return submit_job(
            client,
            entrypoint=plan.entrypoint,
            runtime_env=runtime_env(wheel, plan.env_vars) | {"working_dir": str(working_dir)},
            metadata=plan.metadata,
        )
