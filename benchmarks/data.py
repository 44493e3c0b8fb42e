"""The data plane against a plain PyTorch `DataLoader`, and what its promises cost.

    python -m benchmarks.data [--quick]

Six measurements: (a) JPEG bytes to model-ready tensors at 448 pixels, ours with as many reading tasks as two CPUs are
given, against the released way of reading (`data_baseline.py`, two reading processes) over the same photographs;
(b) time to the first batch at position 0 and at 1,000,000; (c) peak memory of a long stream over a short one's;
(d) throughput with one and two reading tasks; (e) the sequence that is consumed when a reading worker is killed;
(f) realised mix and padding at the released weights.
The last line is one JSON object; a ratio above 1 means that ours is better, except `rss_growth` and
`resume_start_ratio`, which should be 1.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.data_baseline import ReleasedLoader
from benchmarks.harness import describe, report
from pixellm.jobs.prepare import DEMO_DATA, prepare
from pixellm.jobs.train.encode import SampleEncoder
from pixellm.model.processing import PixelLMProcessor, TrainingExample
from pixellm.platform import cluster
from pixellm.platform.data.compose import ComposeLimits, Dialogue, QuestionSource
from pixellm.platform.data.length_order import LengthGroupedOrder
from pixellm.platform.data.mixture import realised_mix
from pixellm.platform.data.order import Draw, MixtureOrder, Order
from pixellm.platform.data.schema import Row, RowDialogue
from pixellm.platform.data.shards import open_shards, write_shards
from pixellm.platform.data.stream import stream_batches
from pixellm.platform.settings import ClusterSettings, DataSettings

BATCH = 8
WARM_UP_SAMPLES = 256
RELEASED_MIX = {"semantic": 2, "referring": 9, "vqa": 2, "muse": 4}
FAR = 1_000_000


class TraceEncoder:
    """The encoder of training, with the process that did the work."""

    def __init__(self, encoder: SampleEncoder) -> None:
        self.encoder = encoder

    def __call__(self, row: Row, dialogue: Dialogue, draw: Draw) -> tuple[int, TrainingExample]:
        """The process id and the encoded sample."""
        return os.getpid(), self.encoder(row, dialogue, draw)


class Corpus:
    """The packaged photographs many times over, under other names, as raw files and as shards."""

    def __init__(self, folder: Path, copies: int) -> None:
        self.raw, self.uri, self.muse_uri = folder / "raw", folder / "shards", folder / "muse"
        (self.raw / "images").mkdir(parents=True)
        content = json.loads((DEMO_DATA / "instances.json").read_text(encoding="utf-8"))
        images, annotations = [], []
        for copy in range(copies):
            for image in content["images"]:
                name = f"{copy:03d}-{image['file_name']}"
                shutil.copy(DEMO_DATA / "images" / image["file_name"], self.raw / "images" / name)
                images.append({**image, "id": image["id"] + copy * 10**7, "file_name": name})
            for annotation in content["annotations"]:
                image_id = annotation["image_id"] + copy * 10**7
                annotations.append({**annotation, "id": annotation["id"] + copy * 10**10, "image_id": image_id})
        text = json.dumps({**content, "images": images, "annotations": annotations})
        (self.raw / "instances.json").write_text(text, encoding="utf-8")
        prepare("coco", DEMO_DATA, folder / "once")
        prepare("muse", DEMO_DATA, self.muse_uri)
        once = list(open_shards(folder / "once").scan(with_images=True))
        write_shards(
            (
                replace(_with_expressions(row), image_id=f"{copy}-{row.image_id}")
                for copy in range(copies)
                for row in once
            ),
            self.uri,
            name="photographs",
        )


def _with_expressions(row: Row) -> Row:
    """The row with its targets' names as referring expressions too."""
    said = tuple(
        RowDialogue("referring", target.phrase, "", (index,))
        for index, target in enumerate(row.targets)
        if not target.is_ignore
    )
    return replace(row, dialogues=(*row.dialogues, *said))


class OurLoader:
    """Batches of ours through Ray Data."""

    def __init__(self, source: QuestionSource, processor: PixelLMProcessor, mask_size: int) -> None:
        self.source, self.processor, self.mask_size = source, processor, mask_size
        self.order = MixtureOrder([len(source)], [1], seed=0)
        self.repeat = 0

    def lists(self, count: int, *, start: int | None = None, max_tasks: int | None = None) -> Iterator[list[Any]]:
        """Yields `count` batches of (process id, example); each call starts elsewhere unless told."""
        self.repeat += 1
        return stream_batches(
            [self.source],
            self.order,
            TraceEncoder(SampleEncoder(self.processor, self.mask_size)),
            global_batch_size=BATCH,
            rank=0,
            world_size=1,
            start_position=self.repeat * 10_000_000 if start is None else start,
            num_positions=count * BATCH,
            block_size=DataSettings().block_size,
            max_tasks=max_tasks,
        )

    def batches(self, count: int, *, max_tasks: int | None = None) -> Iterator[dict[str, Any]]:
        """Yields `count` collated batches."""
        for examples in self.lists(count, max_tasks=max_tasks):
            yield self.processor.collate([example for _, example in examples])


def samples_per_second(batches: Callable[[int], Iterator[dict[str, Any]]], num_samples: int) -> tuple[float, float]:
    """(samples per second after a warm-up, mean targets per sample)."""
    warm_up, count, targets, started = WARM_UP_SAMPLES // BATCH, num_samples // BATCH, 0, 0.0
    for number, batch in enumerate(batches(warm_up + count)):
        targets += (
            sum(len(masks) for masks in batch["target_masks"])
            if "target_rows" not in batch
            else len(batch["target_rows"])
        )
        if number == warm_up - 1:
            started = time.perf_counter()
    return num_samples / (time.perf_counter() - started), targets / BATCH / (warm_up + count)


def compare_loaders(ours: OurLoader, released: ReleasedLoader, num_samples: int, repeats: int) -> dict[str, float]:
    """(a): both sides in turn; the median of each."""
    rates: dict[str, list[float]] = {"ours": [], "released": []}
    targets: dict[str, float] = {}
    for _ in range(repeats):
        for name, batches in (("ours", ours.batches), ("released", released.batches)):
            rate, targets[name] = samples_per_second(batches, num_samples)
            rates[name].append(rate)
    median = {name: statistics.median(values) for name, values in rates.items()}
    shown = ", ".join(
        f"{name} {median[name]:.0f} ({min(values):.0f}–{max(values):.0f}; {targets[name]:.2f} targets a sample)"
        for name, values in rates.items()
    )
    print(f"(a) samples/s at {ours.processor.image_size} px, {repeats} × {num_samples} samples: {shown}")
    return {
        "speedup_vs_dataloader": median["ours"] / median["released"],
        "samples_per_s": median["ours"],
        "dataloader_samples_per_s": median["released"],
    }


def measure_starts(ours: OurLoader, released: ReleasedLoader, repeats: int) -> dict[str, float]:
    """(b): seconds to the first batch, from the beginning and from far on."""
    seconds: dict[str, list[float]] = {"0": [], str(FAR): [], "released": []}
    for _ in range(repeats):
        for place in (0, FAR):
            seconds[str(place)].append(seconds_to_first(ours.lists(8, start=place)))
        seconds["released"].append(seconds_to_first(released.batches(8)))
    median = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"(b) seconds to the first batch at position 0: {median['0']:.2f}, at {FAR:,}: {median[str(FAR)]:.2f}, "
          f"DataLoader: {median['released']:.2f}")  # fmt: skip
    return {"first_batch_s": median["0"], "resume_start_ratio": median[str(FAR)] / median["0"]}


def seconds_to_first(batches: Iterator[Any]) -> float:
    """Seconds until an iterator has given its first value; the rest is consumed afterwards."""
    started = time.perf_counter()
    next(batches)
    seconds = time.perf_counter() - started
    for _ in batches:
        pass
    return seconds


def measure_memory(folder: Path, few: int, many: int) -> dict[str, float]:
    """(c): peak anonymous memory of driver and reading workers over `many` generated samples against `few`."""
    prepare("shapes", None, folder / "shapes", options={"samples": 512})
    source = QuestionSource.open(folder / "shapes", "muse", ComposeLimits(6, 3))
    loader = OurLoader(source, PixelLMProcessor.for_preset("tiny"), 48)
    for _ in loader.batches(few // BATCH):  # allocators and caches fill
        pass
    peaks = {count: peak_memory(lambda count=count: _consume(loader.batches(count // BATCH))) for count in (few, many)}
    growth = {part: peaks[many][part] / peaks[few][part] for part in ("driver", "workers")}
    shown = ", ".join(f"{part} {peaks[few][part] / 2**20:.0f} → {peaks[many][part] / 2**20:.0f} MiB" for part in growth)
    print(f"(c) peak memory from {few:,} to {many:,} samples: {shown}")
    return {"rss_growth": max(growth.values()), "rss_growth_driver": growth["driver"]}


def _consume(batches: Iterator[Any]) -> None:
    for _ in batches:
        pass


def peak_memory(run: Callable[[], Any]) -> dict[str, int]:
    """Highest anonymous resident bytes of this process and of the largest Ray worker below it while `run` runs."""
    done, peaks = threading.Event(), {"driver": 0, "workers": 0}

    def watch() -> None:
        while not done.wait(0.2):
            peaks["driver"] = max(peaks["driver"], anonymous_bytes(os.getpid()))
            sizes = [anonymous_bytes(pid) for pid in reading_workers()]
            peaks["workers"] = max(peaks["workers"], *sizes, 1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run()
    done.set()
    watcher.join()
    return peaks


def reading_workers() -> list[int]:
    """Ray's worker processes below this one."""
    parents, names = {}, {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                names[int(path.name)] = (path / "cmdline").read_bytes()
            except (OSError, ValueError):
                continue

    def is_below(pid: int) -> bool:
        while pid in parents and pid != os.getpid():
            pid = parents[pid]
        return pid == os.getpid()

    return [pid for pid, name in names.items() if name.startswith(b"ray::") and is_below(pid)]


def anonymous_bytes(pid: int) -> int:
    """Resident memory of a process that no other process shares; 0 where it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def measure_scaling(ours: OurLoader, num_samples: int, repeats: int) -> dict[str, float]:
    """(d): exponent of samples per second over reading tasks; 1 would be all of an added CPU."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for tasks, values in rates.items():
            values.append(samples_per_second(lambda n, t=tasks: ours.batches(n, max_tasks=t), num_samples)[0])
    one, two = (statistics.median(values) for values in rates.values())
    exponent = math.log2(two / one)
    print(f"(d) samples/s with one reading task {one:.0f}, with two {two:.0f}: exponent {exponent:.2f} (the consumer "
          f"that collates shares these {os.cpu_count()} CPUs)")  # fmt: skip
    return {"scaling_exponent": exponent}


def compare_faults(ours: OurLoader, num_batches: int) -> dict[str, Any]:
    """(e): what is consumed when a worker is killed in the middle, against what is consumed in peace."""
    peaceful, _ = sequence_digest(ours.lists(num_batches, start=0), kill_at=None)
    disturbed, killed = sequence_digest(ours.lists(num_batches, start=0), kill_at=num_batches // 3)
    equal = peaceful == disturbed
    print(f"(e) {num_batches * BATCH} samples, reading worker {killed} killed (-9) at a third: sequences "
          f"{'equal' if equal else 'DIFFER'} ({peaceful[:12]}, {disturbed[:12]})")  # fmt: skip
    return {"faults_equal": equal}


def sequence_digest(batches: Iterator[list[Any]], kill_at: int | None) -> tuple[str, int | None]:
    """A digest of everything consumed, in order; the worker that read batch `kill_at` is killed when it arrives."""
    digest, killed = hashlib.sha256(), None
    for number, batch in enumerate(batches):
        for _, example in batch:
            for values in (example.input_ids, example.pixels, example.masks):
                digest.update(values.tobytes())
            digest.update(example.sample_id.encode())
        if number == kill_at:
            killed = batch[-1][0]
            os.kill(killed, signal.SIGKILL)
    return digest.hexdigest(), killed


def measure_mix(corpus: Corpus, num_draws: int, num_batches: int) -> dict[str, float]:
    """(f): shares over many draws, and padding of micro-batches of two at a global batch of 160, text alone."""
    uris = {"semantic": corpus.uri, "referring": corpus.uri, "vqa": corpus.uri, "muse": corpus.muse_uri}
    sources = [
        QuestionSource.open(uri, group, ComposeLimits(6 if group == "muse" else 3, 3)) for group, uri in uris.items()
    ]
    weights = list(RELEASED_MIX.values())
    order = MixtureOrder([len(source) for source in sources], weights, seed=0)
    mix = realised_mix(order, weights, 0, num_draws)
    grouped = LengthGroupedOrder(order, sources, group_size=2, window=160, seed=0)
    processor = PixelLMProcessor.for_preset("small")
    shares = {name: padding_share(sources, one, processor, num_batches * 160) for name, one in
              (("as they come", order), ("grouped", grouped))}  # fmt: skip
    print(f"(f) {num_draws:,} draws at {RELEASED_MIX}: {mix.counts}, largest error {mix.max_error:.5f}, "
          f"chi-square p = {mix.p_value:.3f}; padding of micro-batches of 2: "
          + ", ".join(f"{name} {share:.1%}" for name, share in shares.items()))  # fmt: skip
    return {
        "mix_max_error": mix.max_error,
        "mix_p_value": mix.p_value,
        "padding_share": shares["grouped"],
        "padding_share_ungrouped": shares["as they come"],
    }


def padding_share(
    sources: Sequence[QuestionSource], order: Order, processor: PixelLMProcessor, count: int, size: int = 2
) -> float:
    """The share of text positions that are padding; a picture's own positions are not counted."""
    lengths = []
    for position in range(count):
        draw = order.sample_at(position)
        _, dialogue = sources[draw.source].sample(draw)
        turns = [(turn.question, turn.answer, len(turn.target_indices)) for turn in dialogue.turns]
        lengths.append(len(processor.encode_dialogue(turns)[0]) - processor.num_image_tokens)
    table = np.array(lengths).reshape(-1, size)
    return float(1 - table.sum() / (table.max(axis=1).sum() * size))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer samples; below 5 minutes on 2 cores")
    parser.add_argument("--preset", help="accepted and unused: no network is run")
    options = parser.parse_args(arguments)
    os.environ.setdefault("RAY_worker_niceness", "0")  # both sides' processes have the same priority
    torch.set_num_threads(1)
    started = time.perf_counter()
    processor = PixelLMProcessor.for_preset("small")
    processor.image_size, processor.num_image_tokens = 448, 256
    result = describe("data", quick=options.quick)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        corpus = Corpus(folder, 10 if options.quick else 20)
        released = ReleasedLoader(corpus.raw, processor, BATCH)
        info = cluster.connect(ClusterSettings(num_cpus=2))
        try:
            source = QuestionSource.open(corpus.uri, "segmentation", ComposeLimits(3))
            ours = OurLoader(source, processor, 112)
            _consume(ours.lists(96))  # workers start and import
            result |= compare_loaders(ours, released, 1024 if options.quick else 2048, 5)
            result |= measure_starts(ours, released, 3 if options.quick else 5)
            result |= measure_memory(folder, 2000, 20_000 if not options.quick else 8000)
            result |= measure_scaling(ours, 384 if options.quick else 1024, 3)
            result |= compare_faults(ours, 48 if options.quick else 120)
        finally:
            if info.is_ours:
                cluster.disconnect()
        result |= measure_mix(corpus, 20_000, 5 if options.quick else 20)
    result["seconds"] = round(time.perf_counter() - started, 1)
    report(result)


if __name__ == "__main__":
    main()
