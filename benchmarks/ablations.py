"""The paper's Table 4 and PixelLM† in miniature, on generated pictures: does each part of the method pay?

    python -m benchmarks.ablations [--quick] [--start DIR] [--seeds 3] [--processes 2] [--recipes full tokens-1 …]

Every recipe of `recipes/ablations` is trained with several seeds, and answers questions about held-out pictures by
itself. It begins with random weights or, as the paper's networks begin as LLaVA, with the words, language model and
sight of a start that `benchmarks.shapes_start` made; codebook, decoder and what leads to it begin with random weights
always. The trainings run the job's own worker (loop, DeepSpeed engine, order of samples, checkpoints), two processes
beside each other with one thread each; Ray Train is left out, whose start would cost more than these trainings. Recipes
that come to the same settings are trained once. Each run's result is kept below --out, so that an interrupted benchmark
goes on. The last line is one JSON object.
"""

import argparse
import atexit
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.harness import describe, report
from benchmarks.short_training import prepare_shapes, shortened, train_here
from pixellm.platform.settings import ModelSettings, Settings, load_settings

#: What each table varies: title → recipes in the order of its rows.
TABLES: dict[str, tuple[str, ...]] = {
    "number of scales (Table 4a)": ("scales-1", "scales-2", "scales-3"),
    "tokens per group (Table 4b)": ("tokens-1", "tokens-2", "tokens-3", "tokens-4"),
    "token fusion and target refinement loss (Table 4c)": (
        "pixellm-dagger",
        "fusion-only",
        "refinement-only",
        "full",
    ),
    "amount of data (Table 4d)": ("data-250", "data-1000", "full"),
}
SHUFFLED = "shuffled"
"""The control: the full recipe on shards whose questions belong to other pictures."""

#: Splits of `shapes` that a run answers: the held-out pictures, and the held-out combinations of colour and shape.
SPLITS = {"val": "giou", "val_unseen": "unseen_giou"}
METRICS = ("giou", "ciou", "count_accuracy", "forced_giou", "unseen_giou", "unseen_count_accuracy")


@dataclass(frozen=True)
class Budget:
    """How long trainings are.

    Attributes:
        name: as the output calls it.
        steps: optimiser steps of a training.
        pictures: training pictures.
        questions: held-out questions that are answered, of each split.
    """

    name: str
    steps: int
    pictures: int
    questions: int


QUICK = Budget("quick", steps=50, pictures=2000, questions=32)
WHOLE = Budget("whole", steps=250, pictures=4000, questions=100)


@dataclass(frozen=True)
class Run:
    """One training: a recipe, a seed, and the steps that it gets."""

    recipe: str
    seed: int
    steps: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.recipe}-{self.seed}-{self.steps}"


def settings_of(run: Run, data: Path, out: Path) -> Settings:
    """The recipe as it is trained here: its own data folder, one thread, no more than its steps."""
    recipe = "full" if run.recipe == SHUFFLED else run.recipe
    train = data / ("train-shuffled" if run.recipe == SHUFFLED else "train")
    settings = load_settings(f"ablations/{recipe}", [f"--data.sources.0.uri={train}"])
    settings = settings.model_copy(update={"seed": run.seed, "name": run.name})
    return shortened(settings, run.steps, out)


def same_runs(runs: Sequence[Run]) -> dict[Run, Run]:
    """Each run → the run that is trained for it: the first of those whose settings differ in nothing but the name."""
    first: dict[str, Run] = {}
    chosen = {}
    for run in runs:
        flat = settings_of(run, Path("data"), Path("out")).flat()
        key = json.dumps({name: value for name, value in flat.items() if name != "name"}, sort_keys=True)
        chosen[run] = first.setdefault(key, run)
    return chosen


def begun_as(start: Path, settings: Settings, folder: Path) -> Settings:
    """The settings, beginning with what a start has learned; the rest of the network is drawn from the seed.

    The learning rate becomes that of `recipes/shapes.yaml`, which begins so too.

    Args:
        start: model folder of `benchmarks.shapes_start`; it may have other codebook tokens.
        settings: of a training from a preset.
        folder: where the network that the training begins with is written.
    """
    import torch

    from pixellm.jobs.train.build import build_model, build_processor
    from pixellm.model.networks import load_network

    model, learned = build_model(settings), load_network(start, dtype=torch.float32)
    markers = [[network.config.im_start_id, network.config.im_end_id] for network in (model, learned)]
    num_words = min(model.config.codebook_token_ids)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            part = model.part_of(name)
            if part in ("language", "vision") or name.startswith("image_projector."):
                weight.copy_(learned.get_parameter(name))
            elif part == "embeddings":
                weight[:num_words] = learned.get_parameter(name)[:num_words]
                weight[markers[0]] = learned.get_parameter(name)[markers[1]]
    model.save_pretrained(folder)
    build_processor(settings).save_pretrained(folder)
    train = settings.train.model_copy(update={"lr": load_settings("shapes").train.lr})
    return settings.model_copy(update={"model": ModelSettings(init_from=str(folder)), "train": train})


def make_data(folder: Path, budget: Budget) -> None:
    """Prepares the shards; those that are there stay."""
    prepare_shapes(folder / "train", samples=budget.pictures, split="train")
    prepare_shapes(folder / "train-shuffled", samples=budget.pictures, split="train", shuffle_questions=True)
    for split in SPLITS:
        prepare_shapes(folder / split, samples=100, split=split)


def train_and_ask(run: Run, data: Path, out: Path, questions: int, start: Path | None) -> dict[str, float]:
    """Trains one run in this process and answers the held-out questions; a result that is there already is read."""
    folder = out / run.name
    if (folder / "result.json").is_file():
        return dict(json.loads((folder / "result.json").read_text()))
    started = time.process_time()
    settings = settings_of(run, data, out)
    if start is not None:
        settings = begun_as(start, settings, folder / "start")
    result = {"train_cpu_s": train_here(settings, folder)}
    for split, name in SPLITS.items():
        figures = ask(folder / "model", data / split, "generated", questions)
        result |= {name: figures["giou"], name.replace("giou", "count_accuracy"): figures["count_accuracy"]}
        result |= {"ciou": figures["ciou"]} if split == "val" else {}
    result["forced_giou"] = ask(folder / "model", data / "val", "forced", questions)["giou"]
    result["cpu_s"] = time.process_time() - started
    (folder / "result.json").write_text(json.dumps(result))
    return result


def start_process() -> None:
    """Makes a new process a training group of one, with one thread, until it ends."""
    from pixellm.jobs.train.deepspeed_engine import single_process_group

    group = ExitStack()
    group.enter_context(single_process_group())
    atexit.register(group.close)


def ask(model: Path, shards: Path, mode: Any, questions: int) -> dict[str, float]:
    """gIoU and cIoU of the questions with several targets, and the share of all questions with the right number."""
    from pixellm.jobs.evaluate.metrics import SegmentationMeter, score_question
    from pixellm.jobs.evaluate.questions import iterate_questions
    from pixellm.jobs.evaluate.run import open_answerer
    from pixellm.platform.data.compose import ComposeLimits

    every, several = SegmentationMeter(), SegmentationMeter()
    asked = list(iterate_questions(str(shards), "muse", ComposeLimits(max_targets=6), questions))
    with closing(open_answerer(model, mode, batch_size=8)) as answerer:
        for first in range(0, len(asked), 8):
            batch = asked[first : first + 8]
            for question, answer in zip(batch, answerer.answer(batch), strict=True):
                score = score_question(question.masks, answer.masks, is_ordered=answer.is_ordered)
                every.add(score)
                if score.num_asked > 1:
                    several.add(score)
    figures = several.result()
    return {"giou": figures["giou"], "ciou": figures["ciou"], "count_accuracy": every.result()["count_accuracy"]}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard error of the mean (s / √n, s with n − 1); the error of a single value is NaN."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def row(recipe: str, results: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """A recipe's row: mean and standard error over the seeds of every metric."""
    figures: dict[str, Any] = {"recipe": recipe, "seeds": len(results)}
    for metric in METRICS:
        mean, error = mean_and_error([result[metric] for result in results])
        figures |= {f"{metric}_mean": mean, f"{metric}_stderr": None if math.isnan(error) else error}
    return figures


def as_text(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """A table for people: Markdown, figures in percent."""
    heads = ("gIoU", "cIoU", "exact number", "gIoU, words given", "gIoU, unseen", "exact number, unseen")
    lines = [f"\n{title}\n", f"| recipe | seeds | {' | '.join(heads)} |", "|---" * (len(heads) + 2) + "|"]
    for entry in rows:
        cells = [_cell(entry[f"{metric}_mean"], entry[f"{metric}_stderr"]) for metric in METRICS]
        lines.append(f"| {entry['recipe']} | {entry['seeds']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(mean: float, error: float | None) -> str:
    return f"{100 * mean:.1f}" if error is None else f"{100 * mean:.1f} ± {100 * error:.1f}"


def measure(
    recipes: Sequence[str], seeds: int, budget: Budget, processes: int, data: Path, out: Path, start: Path | None
) -> dict[str, list[dict[str, float]]]:
    """Trains every recipe with every seed; returns the results by recipe, in the order of the seeds."""
    runs = [Run(recipe, seed, budget.steps) for seed in range(seeds) for recipe in recipes]
    chosen = same_runs(runs)
    todo = list(dict.fromkeys(chosen.values()))
    results: dict[Run, dict[str, float]] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context, initializer=start_process) as pool:
        futures = {pool.submit(train_and_ask, run, data, out, budget.questions, start): run for run in todo}
        for future in as_completed(futures):
            run, result = futures[future], future.result()
            results[run] = result
            figures = ", ".join(f"{metric} {result[metric]:.3f}" for metric in METRICS)
            print(f"{len(results)} of {len(todo)}: {run.name}: {figures} ({result['cpu_s']:.0f} s CPU)", flush=True)
    return {recipe: [results[chosen[Run(recipe, seed, budget.steps)]] for seed in range(seeds)] for recipe in recipes}


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, asks, and prints the tables."""
    every = (*dict.fromkeys(recipe for rows in TABLES.values() for recipe in rows), SHUFFLED)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short trainings; below 20 minutes on 2 cores")
    parser.add_argument("--preset", help="accepted and unused: the networks are those of the recipes")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each recipe (default: 3)")
    parser.add_argument("--processes", type=int, default=2, help="trainings beside each other (default: 2)")
    parser.add_argument("--recipes", nargs="+", default=every, choices=every, metavar="RECIPE", help="only these")
    parser.add_argument("--start", type=Path, help="model folder of benchmarks.shapes_start; default: random weights")
    parser.add_argument("--out", type=Path, help="keeps shards and results there; default: a folder that is removed")
    options = parser.parse_args(arguments)
    os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that train
    budget = QUICK if options.quick else WHOLE
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="pixellm-ablations-") as scratch:
        out = options.out or Path(scratch)
        data = out / f"data-{budget.pictures}"
        make_data(data, budget)
        out = out / f"from-{options.start.name}" if options.start else out
        results = measure(options.recipes, options.seeds, budget, options.processes, data, out, options.start)
    rows = {recipe: row(recipe, values) for recipe, values in results.items()}
    print(
        f"\n{budget.name} budget: {budget.steps} steps a training from {options.start or 'random weights'}, "
        f"{budget.pictures} pictures, {budget.questions} questions of each split; mean ± standard error over seeds, "
        "in percent"
    )
    for title, names in TABLES.items():
        print(as_text(title, [rows[name] for name in names if name in rows]))
    if SHUFFLED in rows:
        print(as_text("questions of other pictures", [rows[name] for name in ("full", SHUFFLED) if name in rows]))
    result = describe("ablations", quick=options.quick, steps=budget.steps, pictures=budget.pictures)
    result |= {"is_started": options.start is not None, "rows": list(rows.values())}
    for key, recipe, metric in (
        ("full_giou", "full", "giou"),
        ("shuffled_giou", SHUFFLED, "giou"),
        ("count_accuracy", "full", "count_accuracy"),
    ):
        result[key] = rows[recipe][f"{metric}_mean"] if recipe in rows else None
    report(result | {"seconds": time.perf_counter() - started})


if __name__ == "__main__":
    main()
