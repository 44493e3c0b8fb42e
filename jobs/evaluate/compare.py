"""`pixellm compare DIR_A DIR_B`: two evaluations of the same questions, sample by sample."""

import heapq
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pixellm.errors import ConfigError, DataError
from pixellm.jobs.evaluate.job import METRICS_FILE, read_samples
from pixellm.jobs.evaluate.summary import RATIOS, question_sums, resampled_totals
from pixellm.platform import storage
from pixellm.platform.data.shards import open_shards
from pixellm.platform.settings import Settings
from pixellm.platform.tracking import start_run

_FIGURES = ("giou", "ciou", "precision", "recall", "pq", "count_accuracy", "judged_giou", "judged_ciou")
_RESAMPLES = 1000


@dataclass(frozen=True)
class Difference:
    """A figure of both sides, 0 to 1.

    Attributes:
        name: of the figure.
        first: of A.
        second: of B.
        low: of the 95 % interval of B − A, questions paired and whole pictures resampled.
        high: likewise.
        share_better: of the resamples in which B is above A; ties count half.
    """

    name: str
    first: float
    second: float
    low: float
    high: float
    share_better: float


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        first: folder A.
        second: folder B.
        questions: answered in both.
        only_first: answered in A only; left out.
        only_second: answered in B only; left out.
        differences: by figure; judged ones only where one and the same judge was asked.
        changed: (sample, gIoU in A, gIoU in B), the largest change first.
        page: the HTML page with their pictures, if it was written.
    """

    first: str
    second: str
    questions: int
    only_first: int
    only_second: int
    differences: tuple[Difference, ...]
    changed: tuple[tuple[str, float, float], ...]
    page: str | None = None

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """A table for a terminal."""
        lines = [f"{self.questions} questions in both; only in A {self.only_first}, only in B {self.only_second}"]
        lines.append(f"{'':16}{'A':>8}{'B':>8}{'B − A':>8}  95 % interval      B better in")
        for d in self.differences:
            a, b, low, high = (100 * value for value in (d.first, d.second, d.low, d.high))
            interval = f"[{low:+.2f}, {high:+.2f}]"
            lines.append(f"{d.name:16}{a:8.2f}{b:8.2f}{b - a:+8.2f}  {interval:18} {100 * d.share_better:.0f} %")
        lines += [f"{100 * a:6.1f} → {100 * b:5.1f}  {sample}" for sample, a, b in self.changed]
        return "\n".join([*lines, *([self.page] if self.page else [])])


def compare(
    first: str | Path,
    second: str | Path,
    *,
    page: Path | None = None,
    num_changed: int = 12,
    seed: int = 0,
    settings: Settings | None = None,
) -> Comparison:
    """Compares two evaluations.

    Args:
        first: folder of evaluation A.
        second: folder of evaluation B.
        page: HTML file to write, with the samples that changed most side by side.
        num_changed: how many of them.
        seed: of the resampling.
        settings: recorded as a run in MLflow with what was found; None records nothing.

    Raises:
        ConfigError: a folder holds no evaluation, or they are of different data or suites.
        DataError: they have no question in common, or the pictures are no longer there.
    """
    about = [_about(folder) for folder in (first, second)]
    for name, values in (("suite", [a["suite"] for a in about]), ("data", [a["data"]["digest"] for a in about])):
        if values[0] != values[1]:
            raise ConfigError(f"{first} and {second} differ in {name} ({values[0]}, {values[1]}); nothing to compare")
    merged = about[0]["scoring"] == "merged"
    judges = [side["judge"] and (side["judge"]["model"], side["judge"]["revision"]) for side in about]
    only = [0, 0]
    pictures: list[str] = []
    columns = _columns(merged)
    rows: list[list[float]] = []
    largest: list[tuple[float, int, dict[str, Any], dict[str, Any]]] = []
    for a, b in _pairs(first, second, only):
        sums = [question_sums(sample) for sample in (a, b)]
        rows.append([side[name] for side in sums for name in columns])
        pictures.append(a["image_id"])
        heapq.heappush(largest, (abs(a["giou"] - b["giou"]), -len(rows), a, b))
        if len(largest) > num_changed:
            heapq.heappop(largest)
    if not rows:
        raise DataError(f"{first} and {second} have no question in common; evaluate both with the same --limit")
    changed = sorted(largest, key=lambda entry: entry[:2], reverse=True)
    result = Comparison(
        str(first),
        str(second),
        len(rows),
        only[0],
        only[1],
        tuple(
            difference
            for difference in _differences(np.asarray(rows), np.asarray(pictures), merged, seed)
            if judges[0] == judges[1] or not difference.name.startswith("judged_")
        ),
        tuple((a["sample_id"], a["giou"], b["giou"]) for _, _, a, b in changed),
        None if page is None else str(page),
    )
    if page is not None:
        _write_page(result, [(a, b) for _, _, a, b in changed], about[0]["data"]["uri"], page)
    if settings is not None:
        _record(result, about, settings)
    return result


def _record(result: Comparison, about: list[dict[str, Any]], settings: Settings) -> None:
    """A run in MLflow: both sides and their difference by figure, the page, and which runs were compared."""
    with start_run(settings, kind="compare", data_digests={about[0]["suite"]: about[0]["data"]["digest"]}) as tracker:
        for side, folder, evaluation in zip("ab", (result.first, result.second), about, strict=True):
            known = {"folder": folder, "model": evaluation["model"], "run": evaluation.get("run_id") or ""}
            tracker.set_tags({f"pixellm.compare.{side}.{name}": value for name, value in known.items()})
        for difference in result.differences:
            figures = asdict(difference) | {"change": difference.second - difference.first}
            name = figures.pop("name")
            tracker.log_metrics({f"{name}_{key}": value for key, value in figures.items()})
        tracker.log_text(result.to_text(), "comparison/comparison.txt")
        if result.page is not None:
            tracker.log_artifact(result.page, "comparison")


def _about(folder: str | Path) -> dict[str, Any]:
    path = Path(folder) / METRICS_FILE
    if not path.is_file():
        raise ConfigError(f"{folder} holds no {METRICS_FILE}; make it with `pixellm evaluate … --out {folder}`")
    about: dict[str, Any] = storage.read_json(path)
    if "suite" not in about:
        raise ConfigError(f"{folder} holds the evaluation of a training run; wanted one of `pixellm evaluate`")
    return about


def _pairs(first: str | Path, second: str | Path, only: list[int]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Samples of both sides by (row, id), in which order both files are; counts those without a partner in `only`."""
    sides = [iter(read_samples(first)), iter(read_samples(second))]
    a, b = next(sides[0], None), next(sides[1], None)
    while a is not None or b is not None:
        if a is not None and b is not None and a["sample_id"] == b["sample_id"]:
            yield a, b
            a, b = next(sides[0], None), next(sides[1], None)
        elif b is None or (a is not None and _order(a) < _order(b)):
            only[0] += 1
            a = next(sides[0], None)
        else:
            only[1] += 1
            b = next(sides[1], None)


def _order(sample: dict[str, Any]) -> tuple[int, int]:
    return sample["row"], int(sample["sample_id"].rpartition("#")[2])


def _names(figure: str, merged: bool) -> tuple[str, str]:
    return RATIOS[f"{figure}_merged" if merged and figure in ("giou", "ciou") else figure]


def _columns(merged: bool) -> list[str]:
    return sorted({name for figure in _FIGURES for name in _names(figure, merged)})


def _differences(sums: Any, pictures: Any, merged: bool, seed: int) -> Iterator[Difference]:
    columns = _columns(merged)
    _, member = np.unique(pictures, return_inverse=True)
    per_picture = np.zeros((int(member.max()) + 1, sums.shape[1]))
    np.add.at(per_picture, member, sums)
    totals, drawn = per_picture.sum(axis=0), resampled_totals(per_picture, seed=seed, resamples=_RESAMPLES)
    for figure in _FIGURES:
        above, below = (columns.index(name) for name in _names(figure, merged))
        other_above, other_below = above + len(columns), below + len(columns)
        if not totals[below] or not totals[other_below]:
            continue
        with np.errstate(invalid="ignore", divide="ignore"):
            change = drawn[:, other_above] / drawn[:, other_below] - drawn[:, above] / drawn[:, below]
        change = change[np.isfinite(change)]
        if not len(change):
            continue
        low, high = np.percentile(change, [2.5, 97.5])
        better = float(np.mean(change > 0) + 0.5 * np.mean(change == 0))
        a, b = totals[above] / totals[below], totals[other_above] / totals[other_below]
        yield Difference(figure, float(a), float(b), float(low), float(high), better)


def _write_page(result: Comparison, changed: list[tuple[dict[str, Any], dict[str, Any]]], uri: str, page: Path) -> None:
    from pixellm.jobs.evaluate.pictures import sample_panels
    from pixellm.jobs.evaluate.report import render_page

    dataset = open_shards(uri)
    entries = []
    for a, b in changed:
        image = dataset.read_row(a["row"]).image
        truth, before, _ = sample_panels(a, image)
        entries.append({"a": a, "b": b, "panels": (truth, before, sample_panels(b, image)[1])})
    html = render_page(template="compare.html.jinja", result=result, entries=entries)
    storage.write_bytes(page, html.encode())
