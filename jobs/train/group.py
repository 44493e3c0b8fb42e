"""The worker group under Ray Train: `fit` in a thread of its own, while the main thread shows progress and listens.

Ray Train's own Ctrl-C handling aborts the workers wherever they are; it is only installed when `fit` runs in the main
thread, so it never is. The workers are asked to stop instead, and end by themselves after a checkpoint.
"""

import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pixellm.errors import ClusterError, PixelLMError
from pixellm.jobs.train.channel import open_channel
from pixellm.jobs.train.entry import WorkerSpec, train_worker
from pixellm.jobs.train.events import WorkerPlace, WorkerResult
from pixellm.jobs.train.interrupt import StopRequest
from pixellm.jobs.train.plan import speed_of_light
from pixellm.jobs.train.progress import TrainingView
from pixellm.platform.settings import Settings

_POLL_S = 0.25
_DRAIN_POLL_S = 1.0
_LEAST_WORKER_CPUS = 0.1
_log = logging.getLogger(__name__)


def run_group(spec: WorkerSpec, view: TrainingView, stop: StopRequest) -> WorkerResult:
    """Trains with a group of Ray workers.

    Args:
        spec: without a channel; this process is connected to Ray.
        view: receives what the workers report.
        stop: asked after the first Ctrl-C. Before the first step there is nothing to save, and it ends at once.

    Raises:
        KeyboardInterrupt: stopped before the first step.
        PixelLMError: what a worker raised, or that the group failed more often than `train.max_failures`.
        ClusterError: the cluster has not enough logical CPUs or GPUs.
    """
    import ray  # slow

    channel = open_channel()
    view.flops_per_token, view.peak_flops = speed_of_light(spec.settings, ray.cluster_resources())
    notice = DrainNotice()
    fit = _Fit(_trainer(replace(spec, channel=channel)))
    fit.start()
    is_told = False
    while fit.is_alive():
        fit.join(_POLL_S)
        view.take(ray.get(channel.drain.remote()))
        if stop.is_asked and not view.has_started:
            raise KeyboardInterrupt
        for place in notice.new_among(view.places):
            view.note(f"the node of {place.host} is about to be taken away; writing a checkpoint")
            if spec.settings.train.is_elastic:
                channel.request_checkpoint.remote()
            elif not stop.is_asked:
                stop.ask()
        if stop.is_asked and not is_told:
            is_told = True
            channel.request_stop.remote()
            view.note("stopping after this step and writing a checkpoint; Ctrl-C again ends at once")
    view.take(ray.get(channel.drain.remote()))
    if fit.error is not None:
        raise _explain(fit.error, ray.get(channel.fatal.remote()))
    return WorkerResult(**fit.result)


def worker_cpus(settings: Settings, total_cpus: float) -> float:
    """Logical CPUs that each worker asks for, so that every rank's reading tasks still find room.

    Args:
        settings: `train.worker_cpus` is the most that is asked for. An elastic group asks for just that: what the
            cluster has now says nothing about what it has later.
        total_cpus: of the cluster.

    Raises:
        ClusterError: the workers (the fewest that are wanted) and one reading task each do not fit.
    """
    train, task_cpus = settings.train, settings.data.task_cpus
    room = total_cpus / train.min_workers - task_cpus
    if room < (train.worker_cpus if train.is_elastic else _LEAST_WORKER_CPUS):
        raise ClusterError(
            f"the cluster has {total_cpus:g} logical CPUs; {train.min_workers} workers with a reading task of "
            f"{task_cpus:g} each do not fit: lower train.num_workers or data.task_cpus, or raise cluster.num_cpus"
        )
    return train.worker_cpus if train.is_elastic else min(train.worker_cpus, math.floor(100 * room) / 100)


def _trainer(spec: WorkerSpec) -> Any:
    import ray  # slow
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    # How often the controller looks at its workers; Ray's default of 2 s is how late it would notice their end.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    settings, train = spec.settings, spec.settings.train
    resources = ray.cluster_resources()
    if train.use_gpu and resources.get("GPU", 0) < train.min_workers:
        raise ClusterError(
            f"the cluster has {resources.get('GPU', 0):g} GPUs, the recipe wants {train.min_workers}; lower "
            "train.num_workers, or set train.use_gpu=false"
        )
    cpus = worker_cpus(settings, float(resources.get("CPU", 0)))
    return TorchTrainer(
        train_worker,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend="nccl" if train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=(train.min_workers, train.max_workers) if train.is_elastic else train.max_workers,
            elastic_resize_monitor_interval_s=train.resize_check_s,
            use_gpu=train.use_gpu,
            resources_per_worker={"CPU": cpus} | _gpu(train.use_gpu),
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=str(Path(spec.run_dir)),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )


def _gpu(use_gpu: bool) -> dict[str, float]:
    return {"GPU": 1.0} if use_gpu else {}


class DrainNotice:
    """Ray's notices that a node is about to be drained: pre-empted by its owner, or idle and scaled down."""

    def __init__(self, every_s: float = _DRAIN_POLL_S) -> None:
        self._every_s = every_s
        self._asked_at = -math.inf
        self._known: set[str] = set()

    def new_among(self, places: Sequence[WorkerPlace]) -> list[WorkerPlace]:
        """One worker of each node that has got a notice since the last call; Ray is asked now and then only."""
        if time.monotonic() - self._asked_at < self._every_s:
            return []
        self._asked_at = time.monotonic()
        # Ray Train's own watcher asks here; there is no public call outside of a worker.
        from ray._private.state import state

        draining = set(state.get_draining_nodes()) - self._known
        self._known |= draining
        return list({place.node_id: place for place in places if place.node_id in draining}.values())


class _Fit(threading.Thread):
    """`trainer.fit()`, with its outcome kept."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(name="ray-train", daemon=True)
        self._trainer = trainer
        self.result: dict[str, Any] = {}
        self.error: Exception | None = None

    def run(self) -> None:
        """Runs to the end; never raises."""
        try:
            self.result = self._trainer.fit().return_value
        except Exception as error:  # thread boundary: raised again in the main thread
            self.error = error


def _explain(error: Exception, fatal: PixelLMError | None) -> PixelLMError:
    """The error of our own behind a failed run, else one line about Ray's."""
    if fatal is not None:
        return fatal
    _log.error("the worker group failed", exc_info=error)
    failures = getattr(error, "worker_failures", {}) or {}
    lines = [line for line in str(next(iter(failures.values()), error)).splitlines() if line.strip()]
    return PixelLMError(
        f"training failed: {lines[-1][:400] if lines else type(error).__name__}; the same command goes on from the "
        "last checkpoint (PIXELLM_LOG_LEVEL=INFO shows more)"
    )
