"""The same work on one, two and four raylets, and what becomes of it when some of them are lost.

    python -m benchmarks.cluster [--quick]

The same logical CPUs are divided among the raylets, so that the loss of throughput from one to four is what the
platform takes for itself (wanted: at most 10 %). Reading, training (two workers) and batch prediction (two actors) must
come to the same results on each; timed is the second half of each, when every process has started. Then, on four
raylets, one is lost in each kind of work; the prediction, over 2,000 pictures of which 20 are poisoned, also has a
worker killed. The last line is one JSON object.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.cluster_work import PRESET, Sizes, write_pictures
from benchmarks.harness import describe, report
from benchmarks.untrained import write_untrained
from pixellm.jobs.prepare import prepare_demo
from pixellm.platform import storage

_DEADLINE_S = 1800
_QUICK_TURNS = (1, 4)
#: The same forwards and backwards: a machine that grows slower or faster meanwhile favours no number of raylets.
_TURNS = (1, 4, 2, 4, 1)
KINDS = ("data", "training", "prediction")
_SAME_LOSS = 1e-5
_SAME_AREA = 0.02
#: A node's monitors have a machine's cores to themselves; here four of them would share two with the work.
_FEWER_REPORTS = {"REPORTER_UPDATE_INTERVAL_MS": "30000", "RAY_enable_metrics_collection": "0"}


def run_cluster(name: str, raylets: int, folder: Path, sizes: Sizes, *, faults: bool = False) -> dict[str, Any]:
    """The work of one cluster, in a process and a temporary folder of its own; prints how long it took.

    Raises:
        RuntimeError: it ended without a result.
    """
    out = folder / f"{name}.json"
    command = [sys.executable, "-m", "benchmarks.cluster_work", str(raylets), str(folder), str(out)]
    command += [f"--{key}={value}" for key, value in asdict(sizes).items()] + (["--faults"] if faults else [])
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:  # sockets want short paths
        environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        environment |= {"RAY_TMPDIR": scratch, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2", "OMP_NUM_THREADS": "1"}
        environment |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
        environment |= _FEWER_REPORTS
        done = subprocess.run(
            command,
            cwd=Path(__file__).resolve().parent.parent,
            env=environment,
            timeout=_DEADLINE_S,
            capture_output=True,
            text=True,
            check=False,
        )
    if not out.exists():
        raise RuntimeError(f"{raylets} raylets ended without a result: {done.stderr[-3000:]}")
    result: dict[str, Any] = storage.read_json(out)
    seconds = time.perf_counter() - started
    rates = ", ".join(f"{kind} {rate:.1f}/s" for kind, rate in result.get("rates", {}).items())
    print(f"{raylets} raylet{'s'[: raylets > 1]}{', one lost in each' if faults else ''}: {rates} ({seconds:.0f} s)",
          flush=True)  # fmt: skip
    return result


def is_equal(one: dict[str, Any], other: dict[str, Any]) -> dict[str, bool]:
    """By kind of work, whether two clusters came to the same; masks may differ where a logit is next to 0."""
    curves = (one["curve"], other["curve"])
    first, second = one["predicted"]["answers"], other["predicted"]["answers"]
    common = first.keys() & second.keys()
    return {
        "data": one["digest"] == other["digest"],
        "training": curves[0].keys() == curves[1].keys()
        and all(abs(loss - curves[1][step]) <= _SAME_LOSS for step, loss in curves[0].items()),
        "prediction": bool(common) and all(_is_same_answer(first[name], second[name]) for name in common),
    }


def _is_same_answer(one: list[Any], other: list[Any]) -> bool:
    (text, areas), (other_text, other_areas) = one, other
    close = [abs(a - b) <= max(2, _SAME_AREA * max(a, b)) for a, b in zip(areas, other_areas, strict=False)]
    return text == other_text and len(areas) == len(other_areas) and all(close)


def measure(folder: Path, *, quick: bool) -> dict[str, Any]:
    """Runs everything and returns the numbers."""
    timed = Sizes(24576, 80, 800, 0)
    faulty = replace(timed, pictures=200 if quick else 2000, poisoned=5 if quick else 20)
    prepare_demo(folder / "demo")
    (folder / "demo" / "coco").rename(folder / "shards")
    write_pictures(folder / "pictures", timed.pictures, 0)
    write_untrained(PRESET, folder / "model", answers_with_masks=True)
    turns = _QUICK_TURNS if quick else _TURNS
    runs = [run_cluster(f"turn-{turn}", count, folder, timed) for turn, count in enumerate(turns)]
    rates = {kind: _mean_rates(turns, [result["rates"][kind] for result in runs]) for kind in KINDS}
    overheads = {kind: 1 - of[4] / of[1] for kind, of in rates.items()}
    faults = run_cluster("faults", 4, folder, faulty, faults=True)
    first = runs[0]
    same = [is_equal(first, result) for result in runs]
    equal = {kind: all(each[kind] for each in same) for kind in KINDS}
    disturbed = is_equal(first, faults)
    found = faults["predicted"]
    print(f"results equal: {_in_words(equal)}; with a raylet lost: {_in_words(disturbed)}")
    print(f"{faulty.pictures} pictures, {faulty.poisoned} poisoned, a worker and a raylet killed: "
          f"{found['outputs']} answers, {found['quarantined']} in quarantine, {found['duplicates']} twice")  # fmt: skip
    return {
        "overhead_4": max(overheads.values()),
        "overheads": overheads,
        "samples_per_s": {kind: {str(count): rate for count, rate in of.items()} for kind, of in rates.items()},
        "results_equal": all(equal.values()) and all(disturbed.values()),
        "faults_equal": disturbed,
        "worker_killed": faults["worker_killed"],
        "raylets_lost": faults["lost"],
        "predict_inputs": faulty.pictures,
        "predict_outputs": found["outputs"],
        "predict_quarantined": found["quarantined"],
        "predict_duplicates": found["duplicates"],
    }


def _mean_rates(turns: Sequence[int], rates: Sequence[float]) -> dict[int, float]:
    """By number of raylets, the mean rate of its turns."""
    return {
        count: mean(rate for turn, rate in zip(turns, rates, strict=True) if turn == count)
        for count in sorted(set(turns))
    }


def _in_words(by_kind: dict[str, bool]) -> str:
    return ", ".join(f"{kind} {'yes' if is_so else 'NO'}" for kind, is_so in by_kind.items())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one turn of each, no two raylets, 200 pictures")
    parser.add_argument("--preset", help="accepted and unused: the sizes are fixed")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    result = describe("cluster", quick=options.quick)
    with tempfile.TemporaryDirectory(prefix="pixellm-cluster-") as scratch:
        result |= measure(Path(scratch), quick=options.quick)
    result["seconds"] = round(time.perf_counter() - started, 1)
    report(result)


if __name__ == "__main__":
    main()
