"""`pixellm data stats`: what is in shards, as numbers, as a table, as a plot and as a self-contained page."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pixellm.jobs.data_page import Bar, Figure, Histogram, Section, write_page
from pixellm.platform.data.shards import open_shards

_AREA_EDGES = (0.001, 0.01, 0.05, 0.2)
_COUNT_EDGES = (1, 2, 3, 4, 5, 6, 7, 11, 21)
_LISTED_CATEGORIES = 12
_WORD_EDGES = (6, 11, 21, 41, 81)


@dataclass(frozen=True, slots=True)
class ShardStats:
    """What is in some shards.

    Attributes:
        uri: of the shards.
        name: of the dataset.
        digest: of the content.
        rows_by_source: pictures by the source that they came from.
        targets: targets, ignore regions left out.
        ignore_regions: crowd regions.
        targets_per_row: histogram, number of targets → pictures.
        dialogues: dialogues by kind.
        targets_per_question: histogram over dialogues, number of targets → dialogues.
        turns_per_conversation: histogram, number of turns → conversations.
        area_share: targets by share of their picture's pixels.
        question_words: [min, median, max] words of a question; empty without any.
        answer_words: likewise for answers.
        question_lengths: histogram, words of a question → dialogues.
        answer_lengths: likewise for answers that are not composed later.
        categories: the most frequent categories with their counts, at most 20.
        licenses: pictures by licence.
    """

    uri: str
    name: str
    digest: str
    rows_by_source: dict[str, int]
    targets: int
    ignore_regions: int
    targets_per_row: dict[int, int]
    dialogues: dict[str, int]
    targets_per_question: dict[int, int]
    turns_per_conversation: dict[int, int]
    area_share: dict[str, int]
    question_words: tuple[float, ...]
    answer_words: tuple[float, ...]
    question_lengths: dict[int, int]
    answer_lengths: dict[int, int]
    categories: dict[str, int]
    licenses: dict[str, int]

    def to_json_dict(self) -> dict[str, Any]:
        """The numbers as plain JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """The numbers as lines for a terminal."""
        lines = [
            f"{self.name} at {self.uri} (digest {self.digest[:12]})",
            f"pictures            {_listed(self.rows_by_source)}",
            f"targets             {self.targets} and {self.ignore_regions} ignore regions",
            f"dialogues           {_listed(self.dialogues)}",
            f"turns/conversation  {_listed(self.turns_per_conversation)}",
            f"targets/picture     {_listed(self.targets_per_row)}",
            f"targets/question    {_listed(self.targets_per_question)}",
            f"share of picture    {_listed(self.area_share)}",
            f"words in questions  {_spread_text(self.question_words)}",
            f"words in answers    {_spread_text(self.answer_words)}",
            f"categories          {_listed(self.categories)}",
        ]
        return "\n".join([*lines, *(f"licence             {name}: {n}" for name, n in self.licenses.items())])


def stats(uri: str | Path) -> ShardStats:
    """Counts what is in shards, in one streaming pass without reading pictures."""
    dataset = open_shards(uri)
    sources: Counter[str] = Counter()
    per_row: Counter[int] = Counter()
    per_question: Counter[int] = Counter()
    conversations: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    areas: Counter[str] = Counter(dict.fromkeys(_area_labels(), 0))
    categories: Counter[str] = Counter()
    question_lengths: Counter[int] = Counter()
    answer_lengths: Counter[int] = Counter()
    ignored = 0
    for row in dataset.scan():
        targets = [target for target in row.targets if not target.is_ignore]
        ignored += len(row.targets) - len(targets)
        sources[row.source] += 1
        per_row[len(targets)] += 1
        categories.update(target.category for target in targets)
        areas.update(_area_label(target.area / (row.height * row.width)) for target in targets)
        starts = [place for place, dialogue in enumerate(row.dialogues) if dialogue.turn == 0]
        conversations.update(end - start for start, end in pairwise([*starts, len(row.dialogues)]))
        for dialogue in row.dialogues:
            kinds[dialogue.kind] += 1
            per_question[len(dialogue.target_ids)] += 1
            question_lengths[len(dialogue.question.split())] += 1
            if dialogue.kind in ("muse", "vqa"):
                answer_lengths[len(dialogue.answer.split())] += 1
    return ShardStats(
        uri=str(uri),
        name=dataset.info.name,
        digest=dataset.digest,
        rows_by_source=dict(sources),
        targets=sum(categories.values()),
        ignore_regions=ignored,
        targets_per_row=dict(sorted(per_row.items())),
        dialogues=dict(kinds),
        targets_per_question=dict(sorted(per_question.items())),
        turns_per_conversation=dict(sorted(conversations.items())),
        area_share=dict(areas),
        question_words=_spread(question_lengths),
        answer_words=_spread(answer_lengths),
        question_lengths=dict(sorted(question_lengths.items())),
        answer_lengths=dict(sorted(answer_lengths.items())),
        categories=dict(categories.most_common(20)),
        licenses=dataset.info.licenses,
    )


def stats_table(datasets: Sequence[ShardStats]) -> str:
    """One line per dataset, aligned, for a terminal."""
    rows = [("dataset", "pictures", "targets", "ignored", "questions", "targets/question", "licences")]
    rows += [
        (
            one.name,
            str(sum(one.rows_by_source.values())),
            str(one.targets),
            str(one.ignore_regions),
            str(sum(one.dialogues.values())),
            _mean_text(one.targets_per_question),
            str(len(one.licenses)),
        )
        for one in datasets
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def plot_stats(datasets: Sequence[ShardStats], path: Path) -> Path:
    """Draws the histograms of the datasets beside each other, as shares, into a PNG file.

    Args:
        datasets: at least one.
        path: the file; its folder is made.
    """
    from matplotlib.figure import Figure as Canvas  # slow to import

    figure = Canvas(figsize=(13, 7.2), layout="constrained")
    histograms = [histograms_of(one, max(3, _LISTED_CATEGORIES // len(datasets))) for one in datasets]
    for axes, panel in zip(figure.subplots(2, 3).flat, zip(*histograms, strict=True), strict=True):
        labels = list(dict.fromkeys(bar.label for histogram in panel for bar in histogram.bars))
        places = np.arange(len(labels))
        width = 0.84 / len(panel)
        for number, histogram in enumerate(panel):
            counts = {bar.label: bar.count for bar in histogram.bars}
            shares = [100 * counts.get(label, 0) / max(1, histogram.total) for label in labels]
            offset = (number - (len(panel) - 1) / 2) * width
            axes.bar(places + offset, shares, width, label=datasets[number].name)
        axes.set_title(panel[0].title, fontsize=11, loc="left")
        is_crowded = sum(map(len, labels)) > 50
        axes.set_xticks(places, labels, rotation=60 if is_crowded else 0, ha="right" if is_crowded else "center")
        axes.tick_params(labelsize=8)
        axes.set_ylabel("%", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def write_stats_page(datasets: Sequence[ShardStats], path: Path) -> Path:
    """Writes the numbers as one self-contained HTML file; returns its path."""
    sections = [
        Section(
            title=one.name,
            note=f"{one.uri} · digest {one.digest[:12]}",
            figures=_figures(one),
            histograms=histograms_of(one),
            licenses=tuple(one.licenses.items()),
        )
        for one in datasets
    ]
    return write_page(path, "What is in the data", sections)


def histograms_of(one: ShardStats, num_categories: int = _LISTED_CATEGORIES) -> tuple[Histogram, ...]:
    """The six histograms of a dataset, the same for each, as they are plotted."""
    top = dict(list(one.categories.items())[:num_categories])
    return (
        _histogram("targets per picture", _binned(one.targets_per_row, _COUNT_EDGES)),
        _histogram("targets per question", _binned(one.targets_per_question, _COUNT_EDGES)),
        _histogram("mask's share of its picture", _bars(one.area_share)),
        _histogram("words in a question", _binned(one.question_lengths, _WORD_EDGES)),
        _histogram("words in an answer", _binned(one.answer_lengths, _WORD_EDGES)),
        Histogram("most frequent categories", _bars(top), one.targets),
    )


def _histogram(title: str, bars: tuple[Bar, ...]) -> Histogram:
    return Histogram(title, bars, sum(bar.count for bar in bars))


def _figures(one: ShardStats) -> tuple[Figure, ...]:
    counts = {
        "pictures": sum(one.rows_by_source.values()),
        "targets": one.targets,
        "ignore regions": one.ignore_regions,
        **{f"{kind} questions": count for kind, count in one.dialogues.items()},
    }
    return (
        *(Figure(label, f"{count:,}") for label, count in counts.items()),
        Figure("targets per question", _mean_text(one.targets_per_question)),
    )


def _binned(counts: Mapping[int, int], edges: Sequence[int]) -> tuple[Bar, ...]:
    """Counts of whole numbers in bins that start at 0 and at each edge; empty bins at the end are left out."""
    starts = [0, *edges]
    labels = [str(low) if high == low + 1 else f"{low}–{high - 1}" for low, high in pairwise(starts)]
    totals = [0] * len(starts)
    for value, count in counts.items():
        totals[int(np.searchsorted(starts, value, side="right")) - 1] += count
    last = max((place for place, total in enumerate(totals) if total), default=-1)
    labels = [*labels, f"≥ {starts[-1]}"]
    return tuple(Bar(label, total) for label, total in zip(labels[: last + 1], totals[: last + 1], strict=True))


def _bars(counts: Mapping[str, int]) -> tuple[Bar, ...]:
    return tuple(Bar(label, count) for label, count in counts.items())


def _area_labels() -> list[str]:
    edges = [f"{edge:.1%}" for edge in _AREA_EDGES]
    return [f"< {edges[0]}", *(f"{low}–{high}" for low, high in pairwise(edges)), f"≥ {edges[-1]}"]


def _area_label(share: float) -> str:
    return _area_labels()[sum(share >= edge for edge in _AREA_EDGES)]


def _spread(lengths: Mapping[int, int]) -> tuple[float, ...]:
    """[min, median, max] of what a histogram counts."""
    if not lengths:
        return ()
    values = np.repeat(sorted(lengths), [lengths[value] for value in sorted(lengths)])
    return (float(values[0]), float(np.median(values)), float(values[-1]))


def _mean_text(histogram: Mapping[int, int]) -> str:
    total = sum(histogram.values())
    return f"{sum(value * count for value, count in histogram.items()) / total:.2f}" if total else "–"


def _listed(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{key}: {count}" for key, count in counts.items()) or "none"


def _spread_text(spread: tuple[float, ...]) -> str:
    return f"{spread[0]:g} to {spread[2]:g}, median {spread[1]:g}" if spread else "none"
