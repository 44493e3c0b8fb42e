"""The paper's Table 1 in miniature: PixelLM, PixelLM† and the LISA baselines on generated pictures, trained alike.

    python -m benchmarks.comparison [--quick] [--processes 2] [--out DIR]

Every network is trained from random weights for the same number of steps by the training job's own worker (loop,
DeepSpeed engine, order of samples; Ray Train is left out, whose start would cost more), one thread each, two beside
each other, and evaluated by the evaluation job on the same held-out questions. What each is trained with follows the
paper: PixelLM, PixelLM† and LISA_aug with multi-target questions, the original LISA with single objects asked for by
name, and LISA_rec is that LISA behind a language model that names the targets, here trained to do so for as many steps.
The last line is one JSON object.
"""

import argparse
import functools
import json
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import describe, report
from benchmarks.short_training import prepare_shapes, shortened, train_here
from pixellm.platform.settings import Settings, load_settings

#: Method → recipe of its network, or of its two networks: the one that names targets, and the one that segments.
METHODS: dict[str, tuple[str, ...]] = {
    "PixelLM": ("shapes-tiny",),
    "PixelLM†": ("shapes-tiny-dagger",),
    "LISA": ("lisa-tiny",),
    "LISA_rec": ("lisa-tiny-nouns", "lisa-tiny"),
    "LISA_aug": ("lisa-tiny-aug",),
}
FIGURES = ("giou", "ciou", "giou_merged", "ciou_merged", "count_accuracy")
_HEADS = ("gIoU", "cIoU", "gIoU, merged", "cIoU, merged", "exact number")


@dataclass(frozen=True)
class Budget:
    """How long everything is.

    Attributes:
        steps: optimiser steps of every training, 8 samples each.
        pictures: training pictures.
        questions: held-out questions.
    """

    steps: int
    pictures: int
    questions: int


QUICK, WHOLE = Budget(60, 500, 48), Budget(500, 4000, 300)


def make_data(folder: Path, budget: Budget) -> None:
    """Shards of training and held-out pictures, and the training questions answered by names only."""
    from pixellm.platform.data.shards import write_shards

    for split, samples in (("train", budget.pictures), ("val", 100)):
        prepare_shapes(folder / split, samples=samples, split=split)
    if not (folder / "train-nouns" / "dataset.json").is_file():
        write_shards(_naming_rows(folder / "train"), folder / "train-nouns", name="shapes-nouns")


def settings_of(recipe: str, data: Path, out: Path, steps: int) -> Settings:
    """A recipe as it is trained here: its own data folder, one thread, equal steps."""
    settings = load_settings(recipe)
    sources = tuple(
        source.model_copy(update={"uri": str(data / Path(source.uri).name)}) for source in settings.data.sources
    )
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"sources": sources})})
    return shortened(settings, steps, out)


def train(recipe: str, data: Path, out: Path, steps: int) -> float:
    """Trains a recipe in this process, unless its model is there; returns seconds of CPU."""
    settings = settings_of(recipe, data, out, steps)
    folder = out / settings.name
    if (folder / "model" / "config.json").is_file():
        return 0.0
    _use_one_thread()
    from pixellm.jobs.train.deepspeed_engine import single_process_group

    with single_process_group():
        seconds = train_here(settings, folder)
    print(f"{recipe}: {steps} steps in {seconds:.0f} s of CPU", flush=True)
    return seconds


def model_of(method: str, out: Path) -> Path:
    """The method's model folder; LISA_rec's is put together from its two."""
    folders = [out / load_settings(recipe).name / "model" for recipe in METHODS[method]]
    if len(folders) == 1:
        return folders[0]
    from pixellm.model.baselines.lisa_rec import LISA_REC

    both = out / "lisa-rec"
    for part, folder in zip(("language", "lisa"), folders, strict=True):
        shutil.copytree(folder, both / part, dirs_exist_ok=True)
    (both / "config.json").write_text(json.dumps({"model_type": LISA_REC}))
    return both


def evaluate(method: str, data: Path, out: Path, questions: int) -> dict[str, Any]:
    """The evaluation job on a method's model: its row of the table."""
    _use_one_thread()
    from pixellm.jobs.evaluate.job import EvaluationOptions, evaluate_suite

    options = EvaluationOptions(limit=questions, with_report=False)
    folder = out / f"evaluation-{'-'.join(Path(recipe).name for recipe in METHODS[method])}"
    result = evaluate_suite(model_of(method, out), str(data / "val"), folder, "shapes", options)
    figures: dict[str, Any] = {"method": method, "questions": result.questions}
    for name in FIGURES:
        low, high = result.intervals[name]
        figures |= {name: result.metrics[name], f"{name}_low": low, f"{name}_high": high}
    figures |= {f"targets_{side}": result.metrics[f"mean_targets_{side}"] for side in ("asked", "returned")}
    return figures | {"gflops": 1000 * (result.tflops or 0.0)}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people: Markdown, percent with 95 % intervals."""
    lines = [f"| method | {' | '.join(_HEADS)} | targets returned | GFLOPs |", "|---" * (len(_HEADS) + 3) + "|"]
    for row in rows:
        cells = [
            f"{100 * row[name]:.1f} [{100 * row[f'{name}_low']:.1f}, {100 * row[f'{name}_high']:.1f}]"
            for name in FIGURES
        ]
        returned = f"{row['targets_returned']:.2f} of {row['targets_asked']:.2f}"
        lines.append(f"| {row['method']} | {' | '.join(cells)} | {returned} | {row['gflops']:.2f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, evaluates, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short trainings; below 5 minutes on 2 cores")
    parser.add_argument("--preset", help="accepted and unused: the networks are those of the paper in miniature")
    parser.add_argument("--processes", type=int, default=2, help="trainings beside each other (default: 2)")
    parser.add_argument("--out", type=Path, help="keeps shards, models and answers there; default: removed at the end")
    options = parser.parse_args(arguments)
    budget, started = QUICK if options.quick else WHOLE, time.perf_counter()
    recipes = list(dict.fromkeys(recipe for several in METHODS.values() for recipe in several))
    with tempfile.TemporaryDirectory(prefix="pixellm-comparison-") as scratch:
        out = options.out or Path(scratch)
        data = out / f"data-{budget.pictures}"
        make_data(data, budget)
        context = multiprocessing.get_context("spawn")
        # A process for each: DeepSpeed keeps a process group that is gone.
        with ProcessPoolExecutor(options.processes, mp_context=context, max_tasks_per_child=1) as pool:
            train_one = functools.partial(train, data=data, out=out, steps=budget.steps)
            cpu_s = dict(zip(recipes, pool.map(train_one, recipes), strict=True))
            evaluate_one = functools.partial(evaluate, data=data, out=out, questions=budget.questions)
            rows = list(pool.map(evaluate_one, METHODS))
    print(
        f"\n{budget.steps} steps of 8 samples each, {budget.pictures} training pictures, {rows[0]['questions']} "
        "held-out questions; percent with 95 % intervals; operations of an answer with "
        f"{round(rows[0]['targets_asked'])} targets"
    )
    print(table(rows))
    result = describe("comparison", quick=options.quick, steps=budget.steps, pictures=budget.pictures)
    by_method = {row["method"]: row for row in rows}
    result |= {"rows": rows}
    result |= {
        f"{name}_giou": by_method[method]["giou"] for name, method in (("pixellm", "PixelLM"), ("lisa_aug", "LISA_aug"))
    }
    result |= {"gflops_ratio": by_method["PixelLM"]["gflops"] / by_method["LISA_aug"]["gflops"]}
    report(result | {"train_cpu_s": sum(cpu_s.values()), "seconds": round(time.perf_counter() - started, 1)})


def _naming_rows(shards: Path) -> Iterator[Any]:
    """The rows with every question asked for names, in the paper's words, and answered by them."""
    from pixellm.model.baselines.lisa_rec import nouns_question
    from pixellm.platform.data.shards import open_shards

    dataset = open_shards(str(shards))
    for number in range(len(dataset)):
        row = dataset.read_row(number)
        dialogues = tuple(
            replace(d, kind="vqa", question=nouns_question(d.question), answer=f"{', '.join(d.phrases)}.",
                    target_ids=(), phrases=())
            for d in row.dialogues
        )  # fmt: skip
        yield replace(row, dialogues=dialogues)


def _use_one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch  # after the number of threads is set

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
