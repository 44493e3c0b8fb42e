"""Exact resumption and faults: is a stopped run the one that was never stopped, and how long does each fault cost?

    python -m benchmarks.resume [--preset tiny] [--quick] [--seed 0]

A run is stopped at three random steps and resumed, in one process, and its losses compared bit for bit. A group of two
workers loses a node, goes on with one, grows back to two, and its losses are compared with a run in one process. Then a
worker, the driver, a disk and a store fail. Seconds to recover count from the last step (or the kill) to the next step.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import resume_drills as drills
from benchmarks.harness import describe, report
from pixellm.jobs.train.deepspeed_engine import single_process_group
from pixellm.platform import cluster
from pixellm.platform.settings import Settings, load_settings


def recipe(preset: str, folder: Path, steps: int, every: int, **train: Any) -> Settings:
    """The preset's recipe cut to a few steps of four samples, two of a worker."""
    settings = load_settings(preset, [f"--train.steps={steps}", f"--train.checkpoint_every={every}"])
    changes = {"output_dir": str(folder), "micro_batch_size": 2, "grad_accumulation": 1, "num_workers": 2} | train
    return settings.model_copy(update={"train": settings.train.model_copy(update=changes)})


def stop_and_resume(preset: str, folder: Path, steps: int, seed: int) -> tuple[dict[int, float], list[int], bool]:
    """Stops at three random steps; returns the undisturbed curve, the steps, and whether all curves are equal to it."""
    settings = recipe(preset, folder, steps, steps, num_workers=1, grad_accumulation=2)
    whole = drills.run_alone(settings, folder / "whole").curve
    stops = sorted(random.Random(seed).sample(range(1, steps), 3))
    is_equal = True
    for stop in stops:
        before = drills.run_alone(settings, folder / f"stopped-{stop}", stop_after=stop)
        after = drills.run_alone(settings, folder / f"stopped-{stop}")
        is_same = before.curve | after.curve == whole and max(before.curve) == stop
        is_equal = is_equal and is_same
        print(f"stopped after step {stop} of {steps}: the curve is {'equal bit for bit' if is_same else 'ANOTHER'}")
    return whole, stops, is_equal


def refuse_writes(preset: str, folder: Path, steps: int, every: int) -> dict[str, float]:
    """A disk that is full once, a store that fails three times; returns seconds to recover, by fault."""
    alone = recipe(preset, folder, steps, every, num_workers=1, grad_accumulation=2)
    _, disk_s = drills.disk_full(alone, folder / "disk", every)
    _, uploads = drills.store_fails(alone, folder / "store", 3)
    slow = max(uploads, key=lambda upload: upload.attempts)
    print(
        f"disk full: next step after {disk_s:.2f} s; store: there after {slow.seconds:.2f} s, attempt {slow.attempts}"
    )
    return {"disk_full": disk_s, "storage": slow.seconds}


def kill_processes(preset: str, folder: Path, steps: int, every: int) -> tuple[dict[str, float], dict[str, int]]:
    """A worker and the driver; returns seconds to recover and steps repeated, by fault."""
    recover: dict[str, float] = {}
    repeated: dict[str, int] = {}
    settings = recipe(preset, folder, steps, every)
    info = cluster.connect(settings.cluster.model_copy(update={"address": "local", "num_cpus": 4}))
    try:
        outcome = drills.worker_killed(settings, folder / "worker", every + 1)
        recover["worker"], repeated["worker"] = outcome.recover_s[0], outcome.steps_repeated
        print(f"worker killed: {recover['worker']:.1f} s, {repeated['worker']} steps repeated")
        _, recover["driver"], repeated["driver"] = drills.driver_killed(
            settings, folder / "driver", info.address, every + 1
        )
        print(f"driver killed: {recover['driver']:.1f} s, {repeated['driver']} steps repeated")
    finally:
        cluster.disconnect()
    return recover, repeated


def measure(preset: str, *, quick: bool, seed: int) -> dict[str, Any]:
    """Runs everything and returns the numbers."""
    torch.set_num_threads(1)
    steps, every = (16, 4) if quick else (40, 5)
    elastic_steps = steps if quick else 160  # a group that grows needs steps to do so
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    with tempfile.TemporaryDirectory(prefix="pixellm-resume-") as scratch:
        folder = Path(scratch)
        with single_process_group():  # once: DeepSpeed keeps groups that outlive a second one
            whole, stops, is_equal = stop_and_resume(preset, folder / "exact", steps, seed)
            refused = refuse_writes(preset, folder / "refused", steps, every)
            if elastic_steps != steps:
                alone = recipe(preset, folder, elastic_steps, elastic_steps, num_workers=1, grad_accumulation=2)
                whole = drills.run_alone(alone, folder / "alone").curve
        recover, repeated = kill_processes(preset, folder / "killed", steps, every)
        recover |= refused
        repeated |= dict.fromkeys(refused, 0)
        elastic = recipe(
            preset, folder / "elastic", elastic_steps, every, num_workers=(1, 2), worker_cpus=2.0, max_failures=5,
            resize_check_s=1.0,
        )  # fmt: skip
        (outcome,) = drills.in_a_process_of_its_own(elastic, folder / "elastic" / "run", every + 1, grow_after=2)
        difference = drills.largest_difference(outcome.curve, whole)
        recover["node"], repeated["node"] = outcome.recover_s[0], outcome.steps_repeated
        if len(outcome.recover_s) > 1:
            recover["growth"] = outcome.recover_s[-1]
        sizes = " → ".join(map(str, outcome.sizes))
        print(f"workers {sizes}: node lost {recover['node']:.1f} s, largest difference of a loss {difference:.2g}")
    return {
        "bitwise_equal": is_equal,
        "stopped_after": stops,
        "elastic_max_difference": difference,
        "elastic_workers": outcome.sizes,
        "recover_s": recover,
        "steps_repeated": repeated,
        "checkpoint_every": every,
        "steps": steps,
        "elastic_steps": elastic_steps,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="tiny", choices=("tiny", "small"), help="recipe (default: tiny)")
    parser.add_argument("--quick", action="store_true", help="fewer steps; below 5 minutes on 2 cores")
    parser.add_argument("--seed", type=int, default=0, help="chooses the steps at which the run is stopped")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    result = describe("resume", preset=options.preset, quick=options.quick)
    result |= measure(options.preset, quick=options.quick, seed=options.seed)
    result["seconds"] = round(time.perf_counter() - started, 1)
    report(result)


if __name__ == "__main__":
    main()
