"""Which rows of some shards can give a kind of question, found from a few columns at once, and how long its text gets.

The rules are those of `askable.py`, on whole columns instead of row by row: opening 100,000 rows costs a second or two,
not half a minute. Pictures and masks are not read.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pixellm.platform.data.dialogue import ComposeLimits, Group, QuestionPlan
from pixellm.platform.data.phrases import is_described
from pixellm.platform.data.shards import ShardedDataset

#: Sources whose annotators looked for every one of their categories in every picture.
EXHAUSTIVE_SOURCES = frozenset(("ade20k", "coco", "coco_stuff", "mapillary", "shapes"))

#: Characters that a target's group of codebook tokens counts as, and those of a composed question's and answer's frame.
GROUP_LENGTH = 18.0
_FRAME_LENGTH = 52.0

_TARGET_FIELDS = ("category", "phrase", "area", "is_ignore")
_DIALOGUE_FIELDS = ("kind", "question", "answer", "target_ids", "turn")
_COLUMNS = ["source", "height", "width"]
_COLUMNS += [f"targets.list.element.{name}" for name in _TARGET_FIELDS]
_COLUMNS += [f"dialogues.list.element.{name}" for name in _DIALOGUE_FIELDS]

_Ints = npt.NDArray[np.int64]
_Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class UsableRows:
    """The rows that can give a question. Picklable; some bytes a row.

    Attributes:
        rows: their numbers in the shards, ascending.
        num_targets: of each, how many targets can be asked for (composed groups).
        name_length: of each, mean characters of a name (composed groups).
        starts: where each row's dialogues begin in `lengths`, and where the last one's end (written groups).
        lengths: characters of each usable dialogue, question and answer with its groups (written groups).
        vocabulary: categories that were looked for in all rows; empty where that is not known.
        turns: place of each usable dialogue in its conversation (written groups).
    """

    rows: npt.NDArray[np.int32]
    num_targets: npt.NDArray[np.int32]
    name_length: npt.NDArray[np.float32]
    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.float32]
    vocabulary: tuple[str, ...] = ()
    turns: npt.NDArray[np.int16] = field(default_factory=lambda: np.zeros(0, dtype=np.int16))

    def __len__(self) -> int:
        return len(self.rows)

    def written_lengths(self, index: int) -> npt.NDArray[np.float32]:
        """Lengths of the usable dialogues of the usable row `index`, in the row's order."""
        return self.lengths[self.starts[index] : self.starts[index + 1]]

    def written_turns(self, index: int) -> npt.NDArray[np.int16]:
        """Places in their conversations of the usable dialogues of the usable row `index`, in the row's order."""
        return self.turns[self.starts[index] : self.starts[index + 1]]

    def composed_length(self, index: int, plan: QuestionPlan) -> float:
        """About the length of a composed dialogue: its names stand in question and answer, with a group each."""
        left, length = int(self.num_targets[index]), 0.0
        for question, wanted in enumerate(plan.wanted):
            asked = min(max(wanted, 1), max(1, left - plan.kept_after(question)), left)
            left -= asked
            if asked:
                length += _FRAME_LENGTH + asked * (2 * (float(self.name_length[index]) + 4) + GROUP_LENGTH)
        return length


def find_usable_rows(dataset: ShardedDataset, group: Group, limits: ComposeLimits) -> UsableRows:
    """Finds the rows that can give a question of a group within limits."""
    parts = [_of_part(table, group, limits) for table in dataset.column_tables(_COLUMNS)]
    counts = [len(table) for _, table in parts]
    firsts = np.cumsum([0, *counts])
    found = [usable for usable, _ in parts]
    starts, total = [np.zeros(1, dtype=np.int64)], 0
    for usable in found:
        starts.append(usable.starts[1:] + total)
        total += len(usable.lengths)
    vocabularies = [usable.vocabulary for usable in found]
    vocabulary = tuple(sorted(set[str]().union(*vocabularies))) if all(vocabularies) else ()
    return UsableRows(
        rows=np.concatenate([usable.rows + first for usable, first in zip(found, firsts[:-1], strict=True)]).astype(
            np.int32
        ),
        num_targets=np.concatenate([usable.num_targets for usable in found]),
        name_length=np.concatenate([usable.name_length for usable in found]),
        starts=np.concatenate(starts),
        lengths=np.concatenate([usable.lengths for usable in found]),
        vocabulary=vocabulary,
        turns=np.concatenate([usable.turns for usable in found]),
    )


class _Targets:
    """The targets of a part's rows as flat columns; `row` says whose each is."""

    def __init__(self, table: pa.Table, limits: ComposeLimits) -> None:
        self.starts, values = _flattened(table["targets"])
        self.num_rows = len(self.starts) - 1
        self.row = np.repeat(np.arange(self.num_rows), np.diff(self.starts))
        pixels = table["height"].to_numpy().astype(np.int64) * table["width"].to_numpy()
        self.is_big = values["area"].to_numpy() >= limits.min_target_share * pixels[self.row]
        self.is_ignore: _Bools = values["is_ignore"].to_numpy(zero_copy_only=False)
        self.categories, self.category = _encoded(values["category"])
        self.phrases, self.phrase = _encoded(values["phrase"])

    def askable_by_name(self, limits: ComposeLimits) -> _Bools:
        """Which targets some name singles out, alone or together with all of their category."""
        of_category = self.row * max(1, len(self.categories)) + self.category
        of_phrase = self.row * max(1, len(self.phrases)) + self.phrase
        is_real = ~self.is_ignore & ~np.isin(of_category, of_category[self.is_ignore])
        is_single = is_real & self.is_big & (_count_of_key(of_phrase, ~self.is_ignore) == 1)
        is_described_phrase = np.fromiter(map(is_described, self.phrases), bool, len(self.phrases))
        spoils = is_real & (~self.is_big | is_described_phrase[self.phrase])
        members = _count_of_key(of_category, is_real)
        is_whole = is_real & (members > 1) & (members <= limits.max_targets) & (_count_of_key(of_category, spoils) == 0)
        return is_single | is_whole


def _of_part(table: pa.Table, group: Group, limits: ComposeLimits) -> tuple[UsableRows, pa.Table]:
    targets = _Targets(table, limits)
    vocabulary = targets.categories if set(table["source"].unique().to_pylist()) <= EXHAUSTIVE_SOURCES else ()
    num_rows = targets.num_rows
    if group in ("segmentation", "semantic"):
        askable = targets.askable_by_name(limits)
        name_lengths = np.fromiter(map(len, targets.phrases), np.float64, len(targets.phrases))[targets.phrase]
        composed = _composed(targets.row[askable], name_lengths[askable], num_rows, vocabulary)
        return composed, table
    starts, values = _flattened(table["dialogues"])
    turns = _turns(values)
    usable = _usable_dialogues(values, np.repeat(targets.starts[:-1], np.diff(starts)), targets, group, limits)
    usable &= ~_follows_an_unusable_one(usable, turns)
    row = np.repeat(np.arange(num_rows), np.diff(starts))[usable]
    questions = pc.utf8_length(values["question"]).to_numpy()[usable]
    if group == "referring":
        return _composed(row, questions.astype(np.float64), num_rows, vocabulary), table
    answers = pc.utf8_length(values["answer"]).to_numpy()[usable]
    num_targets = pc.list_value_length(values["target_ids"]).to_numpy()[usable]
    lengths = (questions + answers + GROUP_LENGTH * num_targets).astype(np.float32)
    rows, counts = np.unique(row, return_counts=True)
    nothing = np.zeros(len(rows), dtype=np.int32)
    ends = np.cumsum([0, *counts])
    found = UsableRows(
        rows.astype(np.int32), nothing, nothing.astype(np.float32), ends, lengths, vocabulary, turns[usable]
    )
    return found, table


def _turns(values: dict[str, pa.Array]) -> npt.NDArray[np.int16]:
    """Places in conversations; shards from before there were any have none but first turns."""
    if "turn" not in values:
        return np.zeros(len(values["kind"]), dtype=np.int16)
    return pc.fill_null(values["turn"], 0).to_numpy(zero_copy_only=False).astype(np.int16)


def _follows_an_unusable_one(usable: _Bools, turns: npt.NDArray[np.int16]) -> _Bools:
    """Which dialogues come after an unusable one of their conversation."""
    conversation = np.cumsum(turns == 0)
    faults = np.cumsum(~usable)
    before_conversation = np.zeros(int(conversation[-1]) + 1 if len(turns) else 1, dtype=faults.dtype)
    before_conversation[conversation[turns == 0]] = (faults - ~usable)[turns == 0]
    return np.asarray(faults - ~usable > before_conversation[conversation], dtype=np.bool_)


def _composed(
    row: _Ints, name_lengths: npt.NDArray[np.float64], num_rows: int, vocabulary: tuple[str, ...]
) -> UsableRows:
    counts = np.bincount(row, minlength=num_rows)
    sums = np.bincount(row, weights=name_lengths, minlength=num_rows)
    rows = np.flatnonzero(counts)
    means = (sums[rows] / counts[rows]).astype(np.float32)
    no_starts = np.zeros(len(rows) + 1, dtype=np.int64)
    return UsableRows(
        rows.astype(np.int32), counts[rows].astype(np.int32), means, no_starts, np.zeros(0, np.float32), vocabulary
    )


def _usable_dialogues(
    values: dict[str, pa.Array], first_target: _Ints, targets: _Targets, group: Group, limits: ComposeLimits
) -> _Bools:
    """Those of the group with few enough, big enough targets; expressions also have a target."""
    of_group: _Bools = pc.equal(values["kind"], group).to_numpy(zero_copy_only=False)
    starts, ids = _list_offsets(values["target_ids"])
    num_targets = np.diff(starts)
    dialogue = np.repeat(np.arange(len(num_targets)), num_targets)
    is_small = ~targets.is_big[first_target[dialogue] + ids] if len(ids) else np.zeros(0, bool)
    too_small = np.bincount(dialogue[is_small], minlength=len(num_targets)) > 0
    fewest = 1 if group == "referring" else 0
    return of_group & (num_targets >= fewest) & (num_targets <= limits.max_targets) & ~too_small


def _count_of_key(keys: _Ints, among: _Bools) -> _Ints:
    """For each key, how often it occurs among the marked ones."""
    unique, inverse = np.unique(keys, return_inverse=True)
    counts: _Ints = np.bincount(inverse[among], minlength=len(unique))[inverse]
    return counts


def _flattened(column: pa.ChunkedArray) -> tuple[_Ints, dict[str, pa.Array]]:
    """A column of lists of structs as (where each row's begin and the end, the fields of all)."""
    lists = pa.concat_arrays(column.chunks) if column.num_chunks != 1 else column.chunk(0)
    offsets = lists.offsets.to_numpy().astype(np.int64)
    structs = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
    return offsets - offsets[0], {field.name: structs.field(field.name) for field in structs.type}


def _list_offsets(lists: pa.Array) -> tuple[_Ints, _Ints]:
    offsets = lists.offsets.to_numpy().astype(np.int64)
    values = lists.values.slice(offsets[0], offsets[-1] - offsets[0])
    return offsets - offsets[0], values.to_numpy().astype(np.int64)


def _encoded(column: pa.Array) -> tuple[tuple[str, ...], _Ints]:
    encoded = column.dictionary_encode()
    names: Sequence[str] = encoded.dictionary.to_pylist()
    return tuple(names), encoded.indices.to_numpy().astype(np.int64)
