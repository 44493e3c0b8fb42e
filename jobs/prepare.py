"""Public datasets to shards, what is in shards, and how they look: the jobs behind `pixellm data`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pixellm.errors import ConfigError
from pixellm.platform import storage
from pixellm.platform.data.contact_sheet import draw_contact_sheet
from pixellm.platform.data.shards import open_shards, write_shards
from pixellm.platform.data.sources import get_source, is_generated, with_options
from pixellm.platform.data.sources.base import Ledger, PrepareReport, Progress

#: The photographs, masks, captions and questions that come with the package.
DEMO_DATA = Path(__file__).resolve().parent.parent / "platform" / "data" / "demo"

_AREA_EDGES = (0.001, 0.01, 0.05, 0.2)


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
        targets_per_question: histogram over written dialogues, number of targets → dialogues.
        area_share: targets by share of their picture's pixels.
        question_words: [min, median, max] words of a written question; empty without any.
        answer_words: likewise for answers.
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
    area_share: dict[str, int]
    question_words: tuple[float, ...]
    answer_words: tuple[float, ...]
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
            f"targets/picture     {_listed(self.targets_per_row)}",
            f"targets/question    {_listed(self.targets_per_question)}",
            f"share of picture    {_listed(self.area_share)}",
            f"words in questions  {_spread_text(self.question_words)}",
            f"words in answers    {_spread_text(self.answer_words)}",
            f"categories          {_listed(self.categories)}",
        ]
        return "\n".join([*lines, *(f"licence             {name}: {n}" for name, n in self.licenses.items())])


def prepare(
    source: str,
    input_dir: str | Path | None,
    out_uri: str | Path,
    *,
    strict: bool = False,
    skip_bad_masks: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> PrepareReport:
    """Turns a public dataset in its published layout into shards.

    Args:
        source: name of the source, see `pixellm.platform.data.sources.source_names`.
        input_dir: folder with the dataset's files; None for a source that generates its pictures.
        out_uri: folder of the shards; older shards there are replaced in one step when all is done.
        strict: the first fault in the data ends the preparation instead of being counted.
        skip_bad_masks: leave out masks that lie outside their picture instead of ending with an error.
        options: of a generating source, e.g. `{"samples": 2000, "split": "val"}`.
        progress: called with (pictures looked at, pictures in all or None).

    Raises:
        ConfigError: there is no such source, it needs an input folder, or takes no such options.
        DataError: a part is missing or malformed, a mask lies outside its picture, nothing was kept, or, in strict
            mode, any fault.
    """
    reader = with_options(get_source(source), options or {})
    if input_dir is None and not is_generated(reader):
        raise ConfigError(f"{source} is read from a folder: give --in with {reader.layout}")
    ledger = Ledger(strict=strict, skip_bad_masks=skip_bad_masks, progress=progress)
    notes: dict[str, Any] = {"source": source}
    skipped = notes["skipped"] = ledger.counts
    notes |= {"options": dict(options)} if options else {}
    info = write_shards(reader.rows(str(input_dir or ""), ledger), out_uri, name=Path(str(out_uri)).name, notes=notes)
    return PrepareReport(
        source=source,
        uri=str(out_uri),
        digest=info.digest,
        rows=info.counts["rows"],
        targets=info.counts["targets"],
        ignore_regions=info.counts["ignore_regions"],
        dialogues={key.removesuffix("_dialogues"): n for key, n in info.counts.items() if key.endswith("_dialogues")},
        skipped=dict(skipped),
        skipped_names=ledger.names,
        licenses=info.licenses,
    )


def prepare_demo(out_dir: str | Path) -> dict[str, str]:
    """Writes the shards of the packaged demo data; returns the URI for each group of questions."""
    coco, muse = storage.join(out_dir, "coco"), storage.join(out_dir, "muse")
    prepare("coco", DEMO_DATA, coco, strict=True)
    prepare("muse", DEMO_DATA, muse, strict=True)
    return {"segmentation": coco, "vqa": coco, "muse": muse}


def show(uri: str | Path | Sequence[str | Path], out_png: str | Path, n: int = 12) -> Path:
    """Draws a contact sheet into a PNG file.

    Args:
        uri: of shards, or of several.
        out_png: the file; its folder is made.
        n: samples, spread evenly over the shards, with their masks, question and answer.
    """
    uris = [uri] if isinstance(uri, str | Path) else list(uri)
    return draw_contact_sheet([open_shards(one) for one in uris], Path(out_png), n)


def stats(uri: str | Path) -> ShardStats:
    """Counts what is in shards, in one streaming pass without reading pictures."""
    dataset = open_shards(uri)
    sources: Counter[str] = Counter()
    per_row: Counter[int] = Counter()
    per_question: Counter[int] = Counter()
    kinds: Counter[str] = Counter()
    areas: Counter[str] = Counter(dict.fromkeys(_area_labels(), 0))
    categories: Counter[str] = Counter()
    ignored = 0
    question_words: list[int] = []
    answer_words: list[int] = []
    for row in dataset.scan():
        targets = [target for target in row.targets if not target.is_ignore]
        ignored += len(row.targets) - len(targets)
        sources[row.source] += 1
        per_row[len(targets)] += 1
        categories.update(target.category for target in targets)
        areas.update(_area_label(target.area / (row.height * row.width)) for target in targets)
        for dialogue in row.dialogues:
            kinds[dialogue.kind] += 1
            per_question[len(dialogue.target_ids)] += 1
            question_words.append(len(dialogue.question.split()))
            answer_words.append(len(dialogue.answer.split()))
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
        area_share=dict(areas),
        question_words=_spread(question_words),
        answer_words=_spread(answer_words),
        categories=dict(categories.most_common(20)),
        licenses=dataset.info.licenses,
    )


def _area_labels() -> list[str]:
    edges = [f"{edge:.1%}" for edge in _AREA_EDGES]
    return [f"< {edges[0]}", *(f"{low}–{high}" for low, high in pairwise(edges)), f"≥ {edges[-1]}"]


def _area_label(share: float) -> str:
    return _area_labels()[sum(share >= edge for edge in _AREA_EDGES)]


def _spread(counts: list[int]) -> tuple[float, ...]:
    return (float(min(counts)), float(np.median(counts)), float(max(counts))) if counts else ()


def _listed(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{key}: {count}" for key, count in counts.items()) or "none"


def _spread_text(spread: tuple[float, ...]) -> str:
    return f"{spread[0]:g} to {spread[2]:g}, median {spread[1]:g}" if spread else "none"
