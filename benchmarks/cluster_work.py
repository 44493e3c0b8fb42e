"""What `benchmarks.cluster` runs on one cluster of some raylets: reading, training and batch prediction, and faults.

Run as a program it makes the cluster (a head without CPUs and N raylets that share the same logical CPUs), does its
work and writes what came of it as JSON. A process of its own for each cluster: Ray keeps state in the driver.
"""

import argparse
import hashlib
import io
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image

from benchmarks.data import BATCH, OurLoader
from benchmarks.dying import die_once
from benchmarks.resume import recipe
from benchmarks.resume_drills import QUICK_HEALTH_CHECKS, Recorder, run_in_group
from pixellm.jobs.batch.run import BatchProgress, predict_batch
from pixellm.jobs.batch.worker import BatchPlan, open_engine
from pixellm.jobs.block_pool import Pool
from pixellm.model.processing import PixelLMProcessor
from pixellm.platform.data.compose import ComposeLimits, QuestionSource

LOGICAL_CPUS = 8
"""Of all raylets together, however many they are."""
PRESET = "tiny"
_WORKERS = 2
_QUESTION = "Segment everything."
_ASKED_BEFORE_DEATH = 20


@dataclass(frozen=True)
class Sizes:
    """How much is done: samples read, optimiser steps, pictures predicted, and how many of these are poisoned."""

    samples: int
    steps: int
    pictures: int
    poisoned: int


@contextmanager
def raylets(count: int) -> Iterator[tuple[Any, list[Any]]]:
    """A cluster that this process is connected to; yields it and its nodes without the head."""
    import ray
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head | {"_system_config": dict(QUICK_HEALTH_CHECKS)})
    try:
        nodes = [cluster.add_node(num_cpus=LOGICAL_CPUS // count) for _ in range(count)]
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster, nodes
    finally:
        ray.shutdown()
        cluster.shutdown()


def write_pictures(folder: Path, count: int, poisoned: int) -> Path:
    """Small JPEGs of noise; the poisoned are empty, text, cut off, a decompression bomb, or bytes in reverse order."""
    rng = np.random.default_rng(0)
    bad = set(np.random.default_rng(1).choice(count, poisoned, replace=False).tolist())
    for number in range(count):
        path = folder / f"{number // 500:02d}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        sink = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(sink, "JPEG")
        content = sink.getvalue()
        path.write_bytes(_poison(content, number) if number in bad else content)
    return folder


def _poison(content: bytes, number: int) -> bytes:
    bomb = b"P6 100000 100000 255\n" + bytes(64)
    return (b"", b"this is no picture", content[: len(content) // 3], bomb, content[::-1])[number % 5]


def read_samples(shards: str, samples: int, at_half: Callable[[], object] | None = None) -> tuple[float, str]:
    """Streams samples as a trainer does; returns samples/s (see `steady_rate`), and a digest of all in order."""
    limits = ComposeLimits(max_targets=3, max_questions=3, min_target_share=0.01)
    loader = OurLoader(QuestionSource.open(shards, "segmentation", limits), PixelLMProcessor.for_preset(PRESET), 48)
    digest, count = hashlib.sha256(), samples // BATCH
    seen = []
    for number, batch in enumerate(loader.lists(count, start=0)):
        seen.append((time.perf_counter(), number + 1))
        for _, example in batch:
            for values in (example.input_ids, example.pixels, example.masks):
                digest.update(values.tobytes())
        if at_half is not None and number == count // 2:
            at_half()
    return BATCH * steady_rate(seen, count), digest.hexdigest()


def train_steps(
    folder: Path, steps: int, fault: Callable[[Recorder], None] | None = None
) -> tuple[float, dict[int, float]]:
    """Two workers; returns samples/s (see `steady_rate`) and the loss of every step."""
    settings = recipe(PRESET, folder, steps, max(2, steps // 4), num_workers=_WORKERS, max_failures=3)
    seen: list[tuple[float, int]] = []

    def look(view: Recorder) -> None:
        seen.append((time.perf_counter(), view.step))
        if fault is not None:
            fault(view)

    outcome = run_in_group(settings, folder / "run", look)
    return settings.train.global_batch_size * steady_rate(seen, steps), outcome.curve


def predict_pictures(plan: BatchPlan, actors: int) -> float:
    """Predicts; returns pictures/s (see `steady_rate`)."""
    seen: list[tuple[float, int]] = []

    def look(progress: BatchProgress) -> None:
        seen.append((time.perf_counter(), progress.done))

    predict_batch(plan, Pool(actors), on_progress=look)
    return steady_rate(seen, seen[-1][1])


def steady_rate(seen: Sequence[tuple[float, int]], total: int) -> float:
    """Units/s of the second half: by then every process has started, which takes 9 s of a slow core for each.

    Args:
        seen: (seconds, units done) at each look.
        total: units in all.
    """
    began, first = next(look for look in seen if 2 * look[1] >= total)
    ended, last = next(look for look in seen if look[1] == total)
    return (last - first) / (ended - began)


def read_answers(plan: BatchPlan) -> dict[str, Any]:
    """What lies in the folder: texts and mask areas by input, and how often each input comes."""
    rows = {
        kind: [
            row
            for part in sorted((Path(plan.out_uri) / kind).glob("*.parquet"))
            for row in pq.read_table(part).to_pylist()
        ]
        for kind in ("answers", "quarantine")
    }
    names = [row["input"] for kind in rows.values() for row in kind]
    return {
        "outputs": len(rows["answers"]),
        "quarantined": sum(bool(row["reason"]) for row in rows["quarantine"]),
        "duplicates": len(names) - len(set(names)),
        "answers": {row["input"]: [row["text"], [t["area"] for t in row["targets"]]] for row in rows["answers"]},
    }


@dataclass(frozen=True)
class DyingEngine:
    """Opens the plan's engine; while `marker` exists, the first process to be asked so many pictures ends at once."""

    marker: Path

    def __call__(self, plan: BatchPlan) -> Any:
        """The engine, or one that dies."""
        return _Dying(open_engine(plan), self.marker)


class _Dying:
    def __init__(self, engine: Any, marker: Path) -> None:
        self._engine, self._marker, self._asked = engine, marker, 0

    def submit(self, request: Any) -> Any:
        """Asks the engine, if it lives."""
        self._asked += 1
        if self._asked == _ASKED_BEFORE_DEATH:
            die_once(self._marker)
        return self._engine.submit(request)

    def close(self) -> None:
        """Lets go of the model."""
        self._engine.close()


def in_peace(shards: str, plan: BatchPlan, folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Rates and results of the three kinds of work."""
    read_rate, digest = read_samples(shards, sizes.samples)
    train_rate, curve = train_steps(folder / "train", sizes.steps)
    plan = replace(plan, out_uri=str(folder / "answers"))
    predict_rate = predict_pictures(plan, _WORKERS)
    return {
        "rates": {"data": read_rate, "training": train_rate, "prediction": predict_rate},
        "digest": digest,
        "curve": curve,
        "predicted": read_answers(plan),
    }


def with_faults(
    cluster: Any, nodes: list[Any], shards: str, plan: BatchPlan, folder: Path, sizes: Sizes
) -> dict[str, Any]:
    """One raylet is lost in each kind of work, and another joins after it; in prediction a worker is killed too."""
    size = LOGICAL_CPUS // len(nodes)

    def lose(node: Any) -> None:
        cluster.remove_node(node, allow_graceful=False)
        nodes.remove(node)

    def join() -> None:
        nodes.append(cluster.add_node(num_cpus=size))

    _, digest = read_samples(shards, sizes.samples, lambda: lose(nodes[-1]))
    join()

    def lose_a_worker(view: Recorder) -> None:
        hosts = [node for node in nodes if node.node_id in {place.node_id for place in view.places}]
        if view.step >= sizes.steps // 2 and len(nodes) == before and hosts:
            lose(hosts[-1])

    before = len(nodes)
    _, curve = train_steps(folder / "train", sizes.steps, lose_a_worker)
    lost = {"training": before - len(nodes)}
    join()
    marker = folder / "die"
    marker.touch()
    whole = replace(plan, input_uri=str(write_pictures(folder / "poisoned", sizes.pictures, sizes.poisoned)))

    def lose_an_actor(progress: BatchProgress) -> None:
        if 2 * progress.done > progress.total and len(nodes) == before:
            lose(nodes[-1])  # each raylet has an actor: as many actors as raylets, each of a raylet's size

    whole, pool = replace(whole, out_uri=str(folder / "answers")), Pool(before, num_cpus=size)
    predict_batch(whole, pool, open_engine=DyingEngine(marker), on_progress=lose_an_actor)
    found = read_answers(whole)
    return {
        "digest": digest,
        "curve": curve,
        "predicted": found,
        "lost": lost | {"prediction": before - len(nodes)},
        "worker_killed": not marker.exists(),
    }


def main() -> None:
    """One cluster's work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("raylets", type=int)
    parser.add_argument("folder", type=Path, help="holds shards/, pictures/ and model/; gets what comes out")
    parser.add_argument("out", type=Path, help="JSON file to write")
    parser.add_argument("--faults", action="store_true")
    for name, value in asdict(Sizes(256, 12, 200, 5)).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(options.samples, options.steps, options.pictures, options.poisoned)
    given, shards = options.folder, str(options.folder / "shards")
    folder = given / f"{options.out.stem}-work"
    folder.mkdir()
    plan = BatchPlan(
        str(given / "pictures"), _QUESTION, str(given / "model"), "", block_size=16, batch_size=8, max_new_tokens=7
    )
    with raylets(options.raylets) as (cluster, nodes):
        if options.faults:
            result = with_faults(cluster, nodes, shards, plan, folder, sizes)
        else:
            result = in_peace(shards, plan, folder, sizes)
    options.out.write_text(json.dumps(result))


if __name__ == "__main__":
    main()
