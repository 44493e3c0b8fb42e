"""`report.html`: figures beside the paper's, breakdowns as plots, galleries; one file that needs no other."""

import heapq
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, select_autoescape

from pixellm.jobs.evaluate.paper_numbers import PaperTable
from pixellm.jobs.evaluate.pictures import FOUND, INVENTED, MISSED, sample_panels
from pixellm.platform import storage
from pixellm.platform.data.shards import ShardedDataset

if TYPE_CHECKING:
    from pixellm.jobs.evaluate.job import Evaluation

#: Samples of a gallery for each number of targets (0, 1, 2, …, 6 or more).
_PER_COUNT = 3
_TITLES = {
    "giou": "gIoU",
    "ciou": "cIoU",
    "giou_merged": "gIoU, masks merged",
    "ciou_merged": "cIoU, masks merged",
    "precision": "precision at IoU 0.5",
    "recall": "recall at IoU 0.5",
    "pq": "PQ",
    "sq": "SQ (quality of hits)",
    "rq": "RQ (F1 of hits)",
    "count_accuracy": "right number of targets",
    "mean_targets_asked": "targets asked, mean",
    "mean_targets_returned": "targets returned, mean",
    "no_target_accuracy": "rightly nothing",
    "judged_giou": "gIoU × judge",
    "judged_ciou": "cIoU × judge",
    "judge_score": "judge's mean score",
}
_PLAIN = ("mean_targets_asked", "mean_targets_returned", "judge_score")


@dataclass(frozen=True)
class FigureRow:
    """One line of the table of figures; numbers as they are printed."""

    title: str
    value: str
    interval: str


@dataclass(frozen=True)
class Bar:
    """One bar of a breakdown: value and interval in percent, and how much it stands on."""

    label: str
    count: int
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Plot:
    """A breakdown of one figure."""

    title: str
    figure: str
    bars: tuple[Bar, ...]


@dataclass(frozen=True)
class Card:
    """A sample of a gallery."""

    gallery: str
    targets: int
    title: str
    question: str
    answer: str
    true_answer: str
    panels: tuple[str, str, str]
    verdicts: tuple[str, ...]


def write_report(
    evaluation: "Evaluation", dataset: ShardedDataset, folder: Path, *, seed: int, paper: PaperTable | None
) -> Path:
    """Writes `report.html` beside the samples it shows; returns its path.

    Args:
        evaluation: the figures.
        dataset: holds the pictures.
        folder: of the evaluation, `samples.parquet` already in it.
        seed: of the random gallery.
        paper: what the paper reports for this suite.
    """
    from pixellm.jobs.evaluate.job import REPORT_FILE, read_samples  # a circle: the job writes this report

    galleries = choose_samples(read_samples(folder), seed=seed)
    cards = [_card(name, sample, dataset) for name, samples in galleries.items() for sample in samples]
    page = render_page(
        evaluation=evaluation,
        figures=figure_rows(evaluation.metrics, evaluation.intervals),
        paper=paper,
        plots=_plots(evaluation),
        cards=cards,
        target_counts=sorted({card.targets for card in cards}),
        legend=[("found", FOUND), ("missed", MISSED), ("invented", INVENTED)],
    )
    storage.write_bytes(folder / REPORT_FILE, page.encode())
    return folder / REPORT_FILE


def render_page(template: str = "report.html.jinja", **context: Any) -> str:
    """A template of this folder, filled in."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["jinja", "html"]),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**context)


def figure_rows(metrics: Mapping[str, float], intervals: Mapping[str, Sequence[float]]) -> list[FigureRow]:
    """The table of figures: percent, but for means and scores."""
    rows = []
    for name, value in metrics.items():
        factor = 1 if name in _PLAIN else 100
        low, high = (factor * bound for bound in intervals[name])
        rows.append(FigureRow(_TITLES.get(name, name), f"{factor * value:.2f}", f"{low:.2f} to {high:.2f}"))
    return rows


def choose_samples(
    samples: Iterable[dict[str, Any]], *, seed: int, per_count: int = _PER_COUNT
) -> dict[str, list[dict[str, Any]]]:
    """Best, worst and random samples for each number of targets, in one pass over the samples.

    Returns:
        "best" and "worst" by gIoU, and "random"; each sorted by number of targets.
    """
    rng = random.Random(seed)
    kept: dict[tuple[str, int], list[tuple[float, int, dict[str, Any]]]] = {}
    for number, sample in enumerate(samples):
        count = min(6, sample["targets_asked"])
        for gallery, rank in (("best", sample["giou"]), ("worst", -sample["giou"]), ("random", rng.random())):
            heap = kept.setdefault((gallery, count), [])
            heapq.heappush(heap, (rank, -number, sample))
            if len(heap) > per_count:
                heapq.heappop(heap)
    return {
        gallery: [
            sample
            for count in range(7)
            for _, _, sample in sorted(kept.get((gallery, count), []), key=lambda entry: entry[:2], reverse=True)
        ]
        for gallery in ("best", "worst", "random")
    }


def _card(gallery: str, sample: Mapping[str, Any], dataset: ShardedDataset) -> Card:
    verdicts = (
        [
            f"[{prediction + 1}] {score:g}/10{': ' if words else ''}{words}"
            for prediction, score, words in zip(
                sample["pair_prediction"], sample["judge_scores"], sample["judge_words"], strict=True
            )
            if prediction >= 0
        ]
        if sample["judge_scores"] is not None
        else []
    )
    if sample["judge_status"] not in (None, "judged"):
        verdicts = [f"judge: {sample['judge_status']}"]
    return Card(
        gallery=gallery,
        targets=min(6, sample["targets_asked"]),
        title=f"gIoU {100 * sample['giou']:.1f} · {sample['targets_returned']} of {sample['targets_asked']} masks",
        question=sample["question"],
        answer=sample["judge_text"] or sample["answer"],
        true_answer=_named(sample["true_answer"], sample["true_phrases"]),
        panels=sample_panels(sample, dataset.read_row(sample["row"]).image),
        verdicts=tuple(verdicts),
    )


def _named(answer: str, phrases: Sequence[str]) -> str:
    for phrase in phrases:
        answer = answer.replace("{seg}", f"({phrase})", 1)
    return answer


def _plots(evaluation: "Evaluation") -> list[Plot]:
    plots = []
    for title, groups in evaluation.breakdowns.items():
        for figure in ("giou", "recall"):
            bars = tuple(
                Bar(
                    label.removeprefix("reasoning: "),
                    group.get("questions", group.get("targets", 0)),
                    *(100 * v for v in group["figures"][figure]),
                )
                for label, group in groups.items()
                if figure in group["figures"]
            )
            if bars:
                plots.append(Plot(f"by {title}" if title != "few or many" else title, _TITLES[figure], bars))
    return plots
