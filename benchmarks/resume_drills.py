"""Faults of a training run, each with a real process killed or a real write refused, and what became of the run.

`benchmarks.resume` times them on the tiny recipe; the tests run them on a smaller one. A drill returns the loss of
every step as the run ended up with it, so that it can be compared with a run that nothing happened to.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pixellm.jobs.train.checkpoints import CheckpointFolder
from pixellm.jobs.train.entry import WorkerSpec
from pixellm.jobs.train.events import CheckpointEvent, Event, StepRecord, UploadEvent, WorkerResult
from pixellm.jobs.train.group import run_group
from pixellm.jobs.train.interrupt import StopRequest
from pixellm.jobs.train.progress import TrainingView
from pixellm.jobs.train.run import open_sources
from pixellm.jobs.train.worker import run_worker
from pixellm.platform.settings import Settings, load_settings

DEADLINE_S = 300.0
#: How soon a lost node is noticed: Ray's defaults take about a minute.
QUICK_HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_timeout_ms": 500,
    "health_check_failure_threshold": 3,
}
_NOTICED_WITHIN_S = 4.0
NODE_CPUS = 3
"""Logical CPUs of a node of `own_cluster`: room for one worker of two and its reading tasks."""


@dataclass
class Outcome:
    """What became of a run.

    Attributes:
        curve: step → loss, the last time that the step was done.
        recover_s: seconds from the last step before each fault to the first one after it.
        steps_repeated: steps done again.
        sizes: numbers of workers of the groups that trained, in order.
        result: of the workers.
        notes: what a person at the terminal was told.
    """

    curve: dict[int, float]
    recover_s: list[float]
    steps_repeated: int
    sizes: list[int]
    result: WorkerResult
    notes: list[str] = field(default_factory=list)


class Recorder(TrainingView):
    """A view that keeps the curve and may do harm after each look."""

    def __init__(self, total_steps: int, fault: Callable[["Recorder"], None] | None = None) -> None:
        super().__init__(total_steps, None, None)
        self.curve: dict[int, float] = {}
        self.notes: list[str] = []
        self.sizes: list[int] = []
        self.first_step_at: float | None = None
        self._fault = fault

    def take(self, events: Sequence[Event]) -> None:
        """Keeps what happened, then lets the fault happen."""
        super().take(events)
        for event in events:
            if isinstance(event, StepRecord):
                self.first_step_at = self.first_step_at or time.monotonic()
                self.curve[event.step] = event.loss
                if not self.sizes or self.sizes[-1] != self.num_workers:
                    self.sizes.append(self.num_workers)
        if self._fault is not None:
            self._fault(self)

    def note(self, text: str) -> None:
        """Keeps the line."""
        self.notes.append(text)


def run_in_group(settings: Settings, run_dir: Path, fault: Callable[[Recorder], None] | None = None) -> Outcome:
    """Trains with Ray workers; this process is connected to Ray. `fault` is called on what has been seen so far."""
    settings, sources = open_sources(settings, run_dir / "data")
    view = Recorder(settings.train.steps, fault)
    result = run_group(WorkerSpec(settings, str(run_dir), sources), view, StopRequest())
    return Outcome(view.curve, view.recover_s, view.steps_repeated, view.sizes, result, view.notes)


def run_alone(
    settings: Settings, run_dir: Path, *, stop_after: int | None = None, on_event: Callable[[Event], None] | None = None
) -> Outcome:
    """Trains in this process, which is a group of one; stops after a step where one is given."""
    settings, sources = open_sources(settings, run_dir / "data")
    line = _AloneLine(stop_after, on_event)
    result = run_worker(WorkerSpec(settings, str(run_dir), sources), line)  # type: ignore[arg-type]
    return Outcome(line.curve, [], 0, [1], result)


def worker_killed(settings: Settings, run_dir: Path, after_step: int) -> Outcome:
    """kill -9 of the last rank's worker in the middle of a step."""
    return run_in_group(settings, run_dir, killing_a_worker(after_step))


def killing_a_worker(after_step: int) -> Callable[[Recorder], None]:
    """The fault of `worker_killed`; it happens once."""
    is_done = False

    def fault(view: Recorder) -> None:
        nonlocal is_done
        if not is_done and view.step >= after_step:
            is_done = True
            os.kill(view.places[-1].pid, signal.SIGKILL)

    return fault


def driver_killed(
    settings: Settings,
    run_dir: Path,
    address: str,
    after_step: int,
    then: Callable[[Recorder], None] | None = None,
) -> tuple[Outcome, float, int]:
    """kill -9 of a driver; another one goes on, as the same command does.

    Args:
        settings: of the run.
        run_dir: of the run.
        address: of the cluster that this process is connected to.
        after_step: of the first driver's run, when it is killed.
        then: a fault of the second driver's run.

    Returns:
        The second driver's outcome, seconds from the kill to its first step, and the steps repeated.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe, progress = run_dir / "settings.yaml", run_dir / "steps.txt"
    recipe.write_text(settings.to_yaml(), encoding="utf-8")
    driver = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.resume_drills", str(recipe), str(run_dir), address, str(progress)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).resolve().parent.parent,
    )
    try:
        wait_until(lambda: _last_step(progress) >= after_step or driver.poll() is not None, "the first driver's steps")
    finally:
        driver.kill()
        errors = driver.communicate()[1].decode(errors="replace")
    killed_at, reached = time.monotonic(), _last_step(progress)
    if reached < after_step:
        raise RuntimeError(f"the first driver ended by itself at step {reached}: {errors[-2000:]}")
    seen: list[Recorder] = []

    def fault(view: Recorder) -> None:
        seen[:] = [view]
        if then is not None:
            then(view)

    outcome = run_in_group(settings, run_dir, fault)
    recover_s = (seen[0].first_step_at or killed_at) - killed_at
    return outcome, recover_s, reached - (outcome.result.resumed_from or 0)


@contextmanager
def own_cluster() -> Iterator[tuple[Any, Any]]:
    """A cluster of two nodes that this process is connected to; yields it and its second node."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": NODE_CPUS, "include_dashboard": True, "dashboard_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": dict(QUICK_HEALTH_CHECKS)})
    try:
        node = cluster.add_node(num_cpus=NODE_CPUS)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster, node
    finally:
        ray.shutdown()
        cluster.shutdown()


def lose_node(
    cluster: Any, lost: Any, settings: Settings, run_dir: Path, after_step: int, grow_after: int | None
) -> Outcome:
    """A node is killed with the worker on it, and another one joins later.

    Args:
        cluster: that this process is connected to.
        lost: its node that goes.
        settings: with `train.num_workers` [1, 2] and `worker_cpus` of 2.
        run_dir: of the run.
        after_step: when the node goes.
        grow_after: steps with one worker after which a node joins; None: none does.
    """
    state = {"lost_at": 0, "has_grown": False}

    def fault(view: Recorder) -> None:
        if not state["lost_at"] and view.step >= after_step and view.num_workers == 2:
            state["lost_at"] = view.step
            cluster.remove_node(lost, allow_graceful=False)
        is_alone = view.num_workers == 1 and view.sizes[-1:] == [1] and bool(state["lost_at"])
        if grow_after is not None and is_alone and not state["has_grown"] and view.step >= after_step + grow_after:
            state["has_grown"] = True
            _while_halted(view.places[0].pid, lambda: cluster.add_node(num_cpus=NODE_CPUS))

    return run_in_group(settings, run_dir, fault)


def _while_halted(pid: int, action: Callable[[], object]) -> None:
    """Halts a worker for as long as something takes, so that a short run has steps left afterwards."""
    os.kill(pid, signal.SIGSTOP)
    try:
        action()
        time.sleep(_NOTICED_WITHIN_S)
    finally:
        with suppress(ProcessLookupError):  # Ray may have replaced it by then
            os.kill(pid, signal.SIGCONT)


def drain_node(cluster: Any, node: Any, settings: Settings, run_dir: Path, after_step: int) -> Outcome:
    """Ray announces that a node is about to be taken away (pre-emption, in a minute); the run stops as resumable.

    Args:
        cluster: that this process is connected to.
        node: one of its nodes, with a worker of the run.
        settings: with two workers and `worker_cpus` of 2.
        run_dir: of the run.
        after_step: when the notice comes.
    """
    announced: list[subprocess.Popen[bytes]] = []

    def fault(view: Recorder) -> None:
        if not announced and view.step >= after_step:
            command = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
            command += ["--node-id", node.node_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION"]
            command += ["--reason-message", "a drill", "--deadline-remaining-seconds", "60"]
            announced.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))

    try:
        return run_in_group(settings, run_dir, fault)
    finally:
        for command in announced:
            command.wait(60)


def disk_full(settings: Settings, run_dir: Path, at_step: int) -> tuple[Outcome, float]:
    """The kernel refuses what a checkpoint writes beyond 64 KiB.

    Returns:
        The outcome, and seconds from the end of the refused checkpoint's step to the next step's end.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    times: dict[int, float] = {}
    problems: list[str | None] = []

    def on_event(event: Event) -> None:
        if isinstance(event, StepRecord):
            times[event.step] = time.monotonic()
            resource.setrlimit(resource.RLIMIT_FSIZE, (65536 if event.step == at_step else hard, hard))
        if isinstance(event, CheckpointEvent) and event.step == at_step:
            problems.append(event.problem)

    outcome = run_alone(settings, run_dir, on_event=on_event)
    if not problems or problems[0] is None:
        raise RuntimeError(f"the checkpoint of step {at_step} was written in spite of the limit")
    return outcome, times[at_step + 1] - times[at_step]


def store_fails(settings: Settings, run_dir: Path, failures: int) -> tuple[Outcome, list[UploadEvent]]:
    """A store that refuses its first writes and then works; `train.checkpoint_uri` is set to it."""
    fsspec.register_implementation("flaky", FlakyStore, clobber=True)
    FlakyStore.failures_left = failures
    train = settings.train.model_copy(update={"checkpoint_uri": f"flaky://{run_dir / 'store'}"})
    uploads: list[UploadEvent] = []

    def on_event(event: Event) -> None:
        if isinstance(event, UploadEvent):
            uploads.append(event)

    return run_alone(settings.model_copy(update={"train": train}), run_dir, on_event=on_event), uploads


class FlakyStore(LocalFileSystem):  # type: ignore[misc]
    """A store on the local disk that refuses its first writes."""

    protocol = ("flaky",)
    cachable = False
    failures_left = 0

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + str(path).removeprefix("flaky://").lstrip("/")

    def _open(self, path: str, mode: str = "rb", **kwargs: Any) -> Any:
        if "w" in mode and FlakyStore.failures_left > 0:
            FlakyStore.failures_left -= 1
            raise ConnectionError("the store is not reachable")
        return super()._open(path, mode, **kwargs)


def steps_on_disk(run_dir: Path) -> list[int]:
    """Steps of the checkpoints of a run."""
    return CheckpointFolder(run_dir / "checkpoints").steps()


def largest_difference(one: dict[int, float], other: dict[int, float]) -> float:
    """The largest difference of two curves over the steps of the first."""
    return max(abs(loss - other[step]) for step, loss in one.items())


def wait_until(is_true: Callable[[], bool], what: str, deadline_s: float = DEADLINE_S) -> None:
    """Waits for a condition.

    Raises:
        TimeoutError: it did not come.
    """
    end = time.monotonic() + deadline_s
    while not is_true():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {deadline_s:.0f} s for {what}")
        time.sleep(0.05)


class _AloneLine:
    """A worker's end of the channel in one process."""

    def __init__(self, stop_after: int | None, on_event: Callable[[Event], None] | None) -> None:
        self.curve: dict[int, float] = {}
        self._stop_after, self._on_event = stop_after, on_event

    def send(self, event: Event) -> None:
        if isinstance(event, StepRecord):
            self.curve[event.step] = event.loss
        if self._on_event is not None:
            self._on_event(event)

    def is_stop_wanted(self) -> bool:
        return self._stop_after is not None and max(self.curve, default=0) + 1 >= self._stop_after

    def is_checkpoint_wanted(self) -> bool:
        return False


def _last_step(progress: Path) -> int:
    try:
        return int(progress.read_text() or 0)
    except (FileNotFoundError, ValueError):
        return 0


def _drive() -> None:
    """The driver that `driver_killed` kills; or, for `in_a_process_of_its_own`, one with a cluster of its own."""
    parser = argparse.ArgumentParser(description=_drive.__doc__)
    for name in ("settings", "run_dir", "address", "progress"):
        parser.add_argument(name)
    parser.add_argument("--after-step", type=int, default=0)
    parser.add_argument("--grow-after", type=int)
    parser.add_argument("--drain", action="store_true")
    options = parser.parse_args()
    settings, run_dir, progress = load_settings(options.settings), Path(options.run_dir), Path(options.progress)
    if options.address == "own":
        with own_cluster() as (cluster, node):
            outcomes = [lose_node(cluster, node, settings, run_dir, options.after_step, options.grow_after)]
            if options.drain:
                endless = settings.train.model_copy(
                    update={"num_workers": 2, "steps": 10**6, "checkpoint_every": 10**6}
                )
                node = cluster.add_node(num_cpus=NODE_CPUS)
                long = settings.model_copy(update={"train": endless})
                outcomes.append(drain_node(cluster, node, long, run_dir / "drained", 2))
        progress.write_text(json.dumps([asdict(outcome) for outcome in outcomes]))
        return
    import ray

    ray.init(address=options.address, log_to_driver=False, configure_logging=False)
    run_in_group(settings, run_dir, lambda view: _replace_text(progress, str(view.step)))


def _replace_text(path: Path, text: str) -> None:
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(text)
    Path(file.name).replace(path)


def in_a_process_of_its_own(
    settings: Settings, run_dir: Path, after_step: int, *, grow_after: int | None = None, drain: bool = False
) -> list[Outcome]:
    """`lose_node` beside a Ray cluster that this process is connected to, and with `drain` then `drain_node`."""
    run_dir.mkdir(parents=True, exist_ok=True)
    recipe, out = run_dir / "settings.yaml", run_dir / "outcome.json"
    recipe.write_text(settings.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-m", "benchmarks.resume_drills", str(recipe), str(run_dir), "own", str(out)]
    command += ["--after-step", str(after_step)]
    command += ["--grow-after", str(grow_after)] if grow_after is not None else []
    command += ["--drain"] if drain else []
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:  # sockets want short paths
        environment = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "RAY_TMPDIR": scratch}
        environment.pop("RAY_ADDRESS", None)
        done = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parent.parent,
            env=environment,
            timeout=2 * DEADLINE_S,
            capture_output=True,
            text=True,
            check=False,
        )
    if not out.exists():
        raise RuntimeError(f"the drill ended without a result: {done.stderr[-3000:]}")
    return [_outcome(fields) for fields in json.loads(out.read_text())]


def _outcome(fields: dict[str, Any]) -> Outcome:
    curve = {int(step): loss for step, loss in fields["curve"].items()}
    return Outcome(**fields | {"curve": curve, "result": WorkerResult(**fields["result"])})


if __name__ == "__main__":
    _drive()
