"""From what was answered to the dataset: near-duplicates out, splits, shards and the released JSON, statistics.

Everything here is a pure function of the source shards, the outcomes and the seed, in the rows' order: a run that was
killed and went on assembles byte for byte what an undisturbed one does.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pixellm.jobs.muse.decisions import Decisions
from pixellm.jobs.muse.drafts import Fault, Reason
from pixellm.jobs.muse.near_duplicates import NearDuplicates
from pixellm.jobs.muse.outcomes import Outcome, Pair
from pixellm.jobs.muse.released import MUSE_FILE, write_released
from pixellm.jobs.muse.splits import Split, SplitShares, assign_splits, fits
from pixellm.platform import storage
from pixellm.platform.data.schema import Row, RowDialogue, Target
from pixellm.platform.data.shards import DATASET_FILE, ShardedDataset, open_shards, write_shards

_EXAMPLES = 3
RELEASED_FOLDER = "released"

#: The paper's dataset (Sec. 4.1), to stand beside ours.
PAPER = {
    "pairs": 246_000,
    "masks": 910_000,
    "targets_per_answer": 3.7,
    "split_pairs": {"train": 239_000, "val": 2_800, "test": 4_300},
}


@dataclass(frozen=True, slots=True)
class SplitNumbers:
    """What is in one split; `digest` is that of its shards."""

    pictures: int
    pairs: int
    masks: int
    digest: str


@dataclass(frozen=True)
class Assembled:
    """What was kept and what was not.

    Attributes:
        asked: pairs that were asked for.
        kept: pairs in the splits.
        dropped: pairs that are not, by reason. asked = kept + the sum of these.
        examples: for each reason, the details of the first few.
        repaired: kept or dropped pairs that the generator corrected once.
        splits: what is in each.
        targets_per_answer: histogram over kept pairs, number of targets → pairs.
    """

    asked: int
    kept: int
    dropped: dict[str, int]
    examples: dict[str, list[str]]
    repaired: int
    splits: dict[str, SplitNumbers]
    targets_per_answer: dict[int, int]

    @property
    def masks(self) -> int:
        """Target mentions over all answers, the paper's count of masks."""
        return sum(count * pairs for count, pairs in self.targets_per_answer.items())


@dataclass
class _Chosen:
    """The outcomes sorted through: which slots of which rows stay, in which split."""

    kept: dict[int, list[int]] = field(default_factory=dict)
    splits: dict[int, Split] = field(default_factory=dict)
    asked: int = 0
    repaired: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    per_answer: Counter[int] = field(default_factory=Counter)

    def drop(self, image_id: str, fault: Fault) -> None:
        self.dropped[fault.reason.value] += 1
        examples = self.examples.setdefault(fault.reason.value, [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{image_id}: {fault.detail}" if fault.detail else image_id)


#: Gives (row number, outcome) in the rows' order, from the start each time it is called.
ReadOutcomes = Callable[[], Iterable[tuple[int, Outcome]]]


def assemble(
    source: ShardedDataset,
    read_outcomes: ReadOutcomes,
    out_uri: str,
    *,
    seed: int,
    shares: SplitShares,
    decisions: Decisions | None = None,
) -> Assembled:
    """Writes the splits under `out_uri`, each as shards and in the released form.

    Args:
        source: the shards that the outcomes' rows are numbers of.
        read_outcomes: what became of each asked row.
        out_uri: folder of the splits; those of an earlier run there are replaced.
        seed: decides the splits.
        shares: shares of the pictures for val and test.
        decisions: what people decided about pairs; None: nothing.
    """
    decisions = decisions or Decisions()
    chosen = _choose(read_outcomes(), seed, shares, decisions)
    numbers: dict[str, SplitNumbers] = {}
    for split in Split:
        folder, released = split_folders(out_uri, split)
        if split not in chosen.splits.values():
            storage.remove_dir(folder, commit_file=DATASET_FILE)
            storage.remove_dir(released, commit_file=MUSE_FILE)
            continue
        info = write_split(
            partial(_rows, source, read_outcomes, chosen, split, decisions),
            folder,
            released,
            name=f"muse-{split}",
            notes={"source": "muse generate", "source_digest": source.digest, "review": decisions.counts},
        )
        numbers[split.value] = info
    return Assembled(
        asked=chosen.asked,
        kept=sum(map(len, chosen.kept.values())),
        dropped=dict(sorted(chosen.dropped.items())),
        examples=dict(sorted(chosen.examples.items())),
        repaired=chosen.repaired,
        splits=numbers,
        targets_per_answer=dict(sorted(chosen.per_answer.items())),
    )


def split_folders(out_uri: str, split: Split) -> tuple[str, str]:
    """Where the shards and the released form of a split are."""
    return storage.join(out_uri, split.value), storage.join(out_uri, RELEASED_FOLDER, split.value)


def write_split(
    make_rows: Callable[[], Iterator[Row]], folder: str, released: str, *, name: str, notes: Mapping[str, Any]
) -> SplitNumbers:
    """Writes one split in both forms; `make_rows` gives its rows anew each time it is called."""
    info = write_shards(make_rows(), folder, name=name, notes=notes)
    write_released(make_rows(), released)
    masks = sum(len(dialogue.target_ids) for row in open_shards(folder).scan() for dialogue in row.dialogues)
    return SplitNumbers(info.counts["rows"], info.counts["muse_dialogues"], masks, info.digest)


def _choose(outcomes: Iterable[tuple[int, Outcome]], seed: int, shares: SplitShares, decisions: Decisions) -> _Chosen:
    """One pass that needs no picture: what stays, and in which split."""
    chosen, seen = _Chosen(), NearDuplicates()
    counts: dict[str, list[int]] = {}
    names: dict[int, str] = {}
    for row, outcome in outcomes:
        chosen.asked += len(outcome.slots)
        chosen.repaired += outcome.repaired
        for place, slot in enumerate(outcome.slots):
            revised = slot if isinstance(slot, Fault) else decisions.revise(outcome.image_id, slot)
            if isinstance(revised, Pair):
                earlier = seen.find_or_add(revised.question)
                if earlier is None:
                    chosen.kept.setdefault(row, []).append(place)
                    counts.setdefault(outcome.image_id, []).append(len(revised.targets))
                    names[row] = outcome.image_id
                    continue
                revised = Fault(Reason.DUPLICATE, earlier)
            chosen.drop(outcome.image_id, revised)
    splits = assign_splits(counts, seed, shares)
    for row, image_id in names.items():
        split, sizes = splits[image_id], counts[image_id]
        fitting = [place for place, size in zip(chosen.kept[row], sizes, strict=True) if fits(split, size)]
        for size in sizes:
            if fits(split, size):
                chosen.per_answer[size] += 1
            else:
                chosen.drop(image_id, Fault(Reason.OTHER_TEST, f"{size} targets in {split}"))
        chosen.kept[row] = fitting
        if fitting:
            chosen.splits[row] = split
    return chosen


def _rows(
    source: ShardedDataset, read_outcomes: ReadOutcomes, chosen: _Chosen, split: Split, decisions: Decisions
) -> Iterator[Row]:
    for number, outcome in read_outcomes():
        if chosen.splits.get(number) is split:
            slots = [outcome.slots[place] for place in chosen.kept[number]]
            pairs = [decisions.revise(outcome.image_id, slot) for slot in slots if isinstance(slot, Pair)]
            yield muse_row(source.read_row(number), [pair for pair in pairs if isinstance(pair, Pair)])


def muse_row(row: Row, pairs: Iterable[Pair]) -> Row:
    """A picture with its pairs as the `muse` source gives it: only targets that an answer names, in that order."""
    targets: list[Target] = []
    place_of: dict[tuple[bytes, str], int] = {}
    dialogues: list[RowDialogue] = []
    for pair in pairs:
        places: list[int] = []
        for index, phrase in zip(pair.targets, pair.phrases, strict=True):
            target = row.targets[index]
            key = (target.mask["counts"], target.category)
            if key not in place_of:
                place_of[key] = len(targets)
                targets.append(Target(target.target_id, target.category, phrase, target.box, target.mask, target.area))
            places.append(place_of[key])
        dialogues.append(RowDialogue("muse", pair.question, pair.answer, tuple(places), pair.phrases))
    return Row(
        image_id=row.image_id,
        source="muse",
        image=row.image,
        height=row.height,
        width=row.width,
        license=row.license,
        targets=tuple(targets),
        dialogues=tuple(dialogues),
    )
