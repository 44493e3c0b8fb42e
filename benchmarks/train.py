"""The training step: Ray Train + DeepSpeed + streaming data, beside a bare loop and beside the released algorithm.

    python -m benchmarks.train [--preset small] [--quick]

One worker with one thread trains the recipe's network for real. It is first left alone, for its samples per second,
its waits for data and the time of its checkpoints; then it is halted again and again (SIGSTOP, the whole process), and
meanwhile the other two sides take the same steps' batches in this process, with one thread too. Steps that a halt may
have touched are not counted. The last line is one JSON object; a ratio above 1 means that ours is better, except for
`overhead_vs_bare`: how much longer our step takes than the bare loop's.
"""

import argparse
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import describe, report
from benchmarks.resume_drills import Recorder
from benchmarks.train_baselines import BareTrainer, SampleReader, our_loss, released_loss
from pixellm.jobs.train.build import build_model, build_processor
from pixellm.jobs.train.entry import WorkerSpec
from pixellm.jobs.train.events import CheckpointEvent, Event, StepRecord
from pixellm.jobs.train.group import run_group
from pixellm.jobs.train.interrupt import StopRequest
from pixellm.jobs.train.run import open_sources
from pixellm.platform import cluster
from pixellm.platform.settings import Settings, load_settings

REPEATS = 5
_SMALL_BATCH = ["--train.micro_batch_size=2", "--train.grad_accumulation=1"]
WARM_STEPS = 2


class Referee(Recorder):
    """Watches our run, and halts it while the other sides take their turns.

    Args:
        settings: of the run.
        num_alone: steps that our side takes undisturbed, after the first ones.
        per_turn: steps of a turn.
        others: name → takes one step (0-based number) and returns its seconds.
        stop: ends our run.
    """

    def __init__(
        self,
        settings: Settings,
        num_alone: int,
        per_turn: int,
        others: dict[str, Callable[[int], float]],
        stop: StopRequest,
    ) -> None:
        super().__init__(settings.train.steps)
        self.alone: list[StepRecord] = []
        self.checkpoint_s: list[float] = []
        self.turns: list[dict[str, list[float]]] = []
        self._num_alone, self._per_turn, self._others, self._stop = num_alone, per_turn, others, stop
        self._ours: dict[int, float] = {}
        self._counted_from = 0

    def take(self, events: Sequence[Event]) -> None:
        """Counts what is undisturbed; halts our run when a turn of it is over."""
        super().take(events)
        for event in events:
            if isinstance(event, CheckpointEvent):
                self.checkpoint_s.append(event.seconds)
            if isinstance(event, StepRecord):
                if WARM_STEPS < event.step <= WARM_STEPS + self._num_alone:
                    self.alone.append(event)
                elif event.step > self._counted_from:
                    self._ours[event.step] = event.step_s
        if self.step < WARM_STEPS + self._num_alone or self._stop.is_asked:
            return
        if not self.turns and not self._counted_from:
            self._begin_turn()
        elif len(self._ours) >= self._per_turn:
            self._let_others()
            self._begin_turn()
            if len(self.turns) == REPEATS:
                self._stop.ask()

    def _begin_turn(self) -> None:
        """The step in progress is touched by the halt, and a quick one may have ended unseen before; the next count."""
        is_quick = statistics.median(record.step_s for record in self.alone) < 1.0
        self._counted_from, self._ours = self.step + 1 + is_quick, {}

    def _let_others(self) -> None:
        steps = sorted(self._ours)[: self._per_turn]
        turn = {"ours": [self._ours[step] for step in steps]}
        pids = [place.pid for place in self.places]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        try:
            for name, take_step in self._others.items():
                turn[name] = [take_step(step - 1) for step in steps]
        finally:
            for pid in pids:
                os.kill(pid, signal.SIGCONT)
        self.turns.append(turn)
        shown = ", ".join(f"{name} {statistics.mean(values):.2f} s" for name, values in turn.items())
        print(f"turn {len(self.turns)}, a step: {shown}", flush=True)


def recipe(preset: str, folder: Path, num_steps: int, checkpoint_every: int) -> Settings:
    """The recipe of a preset with one worker and one thread, and as released: its mix and the parts that it trains.

    Composed questions stand for the released groups of semantic and referring ones: 11 : 2 : 4. As by the released
    loaders, three questions are asked of a picture, or as many as it gives.
    """
    changes = ["--train.num_workers=1", "--train.threads_per_worker=1", f"--train.steps={num_steps}"]
    changes += [f"--train.checkpoint_every={checkpoint_every}", f"--train.output_dir={folder}", "--data.max_tasks=1"]
    changes += ["--data.min_questions=3"]
    changes += [f"--data.sources.{place}.weight={weight}" for place, weight in enumerate((11, 2, 4))]
    changes += ["--train.train_vision=false", "--train.train_language=false", "--train.lora.enabled=true"]
    changes += ["--train.micro_batch_size=2", "--train.grad_accumulation=2"] if preset == "tiny" else _SMALL_BATCH
    return load_settings(preset, changes)


def measure(preset: str, *, quick: bool) -> dict[str, Any]:
    """Runs all three sides and returns the numbers."""
    torch.set_num_threads(1)
    num_alone, per_turn = (4, 1) if quick else (24, 3)
    checkpoint_every = max(2, num_alone // 2)
    stop = StopRequest()
    with tempfile.TemporaryDirectory(prefix="pixellm-train-") as scratch:
        settings = recipe(preset, Path(scratch), WARM_STEPS + num_alone + 100 * per_turn * REPEATS, checkpoint_every)
        settings, sources = open_sources(settings, Path(scratch) / "data")
        spec = WorkerSpec(settings, str(Path(scratch) / "run"), sources)
        reader = SampleReader(sources, spec.order(), build_processor(settings), settings.data.mask_size)
        model = build_model(settings)
        bare, released = BareTrainer(model, settings.train), BareTrainer(model, settings.train)
        others = {
            "bare": lambda step: timed(lambda batch: bare.step(batch, our_loss),
                                       reader.ours(step, settings.train).micro_batches),
            "released": lambda step: timed(lambda batch: released.step(batch, released_loss),
                                           reader.released(step, settings.train)),
        }  # fmt: skip
        for name, take_step in others.items():
            print(f"{name}: first step {take_step(0):.2f} s", flush=True)
        referee = Referee(settings, num_alone, per_turn, others, stop)
        # Ray's own 15 would leave our side what others on the machine leave over.
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112
        cluster.connect(settings.cluster.model_copy(update={"address": "local", "num_cpus": 2}))
        try:
            run_group(spec, referee, stop)
        finally:
            cluster.disconnect()
        weights = sum(p.numel() for p in model.parameters()) / 1e6
    return numbers(referee, settings, load_settings(preset).train.checkpoint_every, weights)


def timed(step: Callable[[Any], float], batch: Any) -> float:
    """Seconds of a step; making its batch is not counted."""
    started = time.perf_counter()
    step(batch)
    return time.perf_counter() - started


def numbers(referee: Referee, settings: Settings, checkpoint_every: int, weights: float) -> dict[str, Any]:
    """The result of a watched run.

    Args:
        referee: after the run.
        settings: of the run.
        checkpoint_every: the recipe's own interval, against which a checkpoint's stall counts.
        weights: of the network, in 10⁶.
    """
    alone_s = sum(record.step_s for record in referee.alone)
    step_s = statistics.median(record.step_s for record in referee.alone)
    stall_s = statistics.median(referee.checkpoint_s)
    means = {name: [statistics.mean(turn[name]) for turn in referee.turns] for name in ("ours", "bare", "released")}
    # Of sums: turns hold different pictures, some with three questions and some with one.
    ours, bare, released = (sum(means[name]) for name in ("ours", "bare", "released"))
    return {
        "overhead_vs_bare": ours / bare - 1,
        "speedup_vs_released": released / ours,
        "data_wait_share": sum(record.data_wait_s for record in referee.alone) / alone_s,
        "checkpoint_stall_share": stall_s / (checkpoint_every * step_s + stall_s),
        "samples_per_s": sum(record.num_samples for record in referee.alone) / alone_s,
        "step_s": {name: statistics.median(values) for name, values in means.items()},
        "checkpoint_s": stall_s,
        "checkpoint_every": checkpoint_every,
        "samples_per_step": settings.train.global_batch_size,
        "million_weights": round(weights, 1),
        "repeats": len(referee.turns),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=("tiny", "small"), help="recipe (default: small)")
    parser.add_argument("--quick", action="store_true", help="fewer steps; below 5 minutes on 2 cores")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    result = describe("train", preset=options.preset, quick=options.quick)
    result |= measure(options.preset, quick=options.quick)
    result["seconds"] = round(time.perf_counter() - started, 1)
    report(result)


if __name__ == "__main__":
    main()
