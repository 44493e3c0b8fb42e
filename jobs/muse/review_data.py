"""What the review page shows and writes: pairs with their masks, decisions about them, and the revised dataset.

A folder of `muse generate` is reviewed split by split; any other shards with reasoning questions are one split.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from threading import Lock
from typing import Any

from pixellm.errors import DataError
from pixellm.jobs.muse.assemble import muse_row, split_folders, write_split
from pixellm.jobs.muse.decisions import Decision, Decisions, Verdict, pair_id, read_decisions, write_decision
from pixellm.jobs.muse.outcomes import Pair
from pixellm.jobs.muse.splits import Split
from pixellm.platform import storage
from pixellm.platform.data.schema import Row
from pixellm.platform.data.shards import DATASET_FILE, ShardedDataset, open_shards, write_shards


@dataclass(frozen=True)
class AppliedReview:
    """What writing the decisions back came to, by split.

    Attributes:
        pairs: left in each split; a split of which nothing is left stays as it was.
        decisions: by verdict.
    """

    pairs: dict[str, int]
    decisions: dict[str, int]

    def to_json_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def to_text(self) -> str:
        """For a terminal."""
        pairs = ", ".join(f"{name}: {count} pairs" for name, count in self.pairs.items())
        decided = ", ".join(f"{count} {verdict}" for verdict, count in self.decisions.items()) or "no decisions"
        return f"written back ({decided}); {pairs}"


class ReviewFolder:
    """A dataset under review; safe to use from several threads.

    Args:
        uri: of a `muse generate` folder, or of shards.

    Raises:
        DataError: there is neither, or no split holds a reasoning question.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self._lock = Lock()
        self._open()

    @property
    def splits(self) -> dict[str, int]:
        """Pictures of each split."""
        return {name: len(rows) for name, rows in self._rows.items()}

    def summary(self) -> dict[str, Any]:
        """Counts for the page's header."""
        with self._lock:
            splits = {
                name: {"pictures": len(self._rows[name]), "pairs": len(ids), "decided": self._num_decided(ids)}
                for name, ids in self._pair_ids.items()
            }
            return {"uri": self.uri, "splits": splits, "decisions": self._decisions.counts}

    def item(self, split: str, position: int) -> dict[str, Any]:
        """A picture's pairs with their masks, and what was decided about each."""
        with self._lock:
            row = self._row(split, position)
            pairs = [self._shown_pair(row, pair) for pair in _pairs(row)]
        return {
            "split": split,
            "position": position,
            "image_id": row.image_id,
            "height": row.height,
            "width": row.width,
            "license": row.license,
            "pairs": pairs,
        }

    def picture(self, split: str, position: int) -> bytes:
        """The encoded picture."""
        with self._lock:
            return self._row(split, position).image

    def decide(self, split: str, position: int, pair: str, verdict: Verdict, who: str, **edit: Any) -> Decision:
        """Writes a decision down at once.

        Args:
            split: name of the split.
            position: of the picture in it.
            pair: id of the pair.
            verdict: the decision.
            who: the person's name.
            edit: for the verdict "edit", the texts of `Decision`.

        Raises:
            DataError: there is no such pair, the edit does not fit it, or nobody's name is given.
        """
        name = " ".join(who.split())[:80]
        if not name:
            raise DataError("a decision needs a name: say who decides")
        with self._lock:
            row = self._row(split, position)
            found = next((one for one in _pairs(row) if _id(row, one) == pair), None)
            if found is None:
                raise DataError(f"{split} {position} has no pair {pair}; the dataset has changed, load the page again")
            now = datetime.now(UTC).isoformat(timespec="microseconds")
            decision = Decision(pair, row.image_id, verdict, name, now, **(edit if verdict == "edit" else {}))
            if verdict == "edit":
                decision.edited(found)
            write_decision(self.uri, decision)
            self._decisions = read_decisions(self.uri)
            return decision

    def apply(self) -> AppliedReview:
        """Writes the dataset anew as people left it: rejected pairs out, edited ones changed, in both forms."""
        with self._lock:
            left: dict[str, int] = {}
            for name, dataset in self._datasets.items():
                make_rows = partial(_revised_rows, dataset, self._decisions)
                count = sum(len(row.dialogues) for row in make_rows())
                if count:
                    self._rewrite(name, dataset, make_rows)
                left[name] = count or len(self._pair_ids[name])
            self._open()
            return AppliedReview(left, self._decisions.counts)

    def _rewrite(self, name: str, dataset: ShardedDataset, make_rows: Any) -> None:
        notes = {**dataset.info.notes, "review": self._decisions.counts}
        title = dataset.info.name
        if dataset.uri == self.uri:
            write_shards(make_rows(), dataset.uri, name=title, version=dataset.info.version, notes=notes)
            return
        folder, released = split_folders(self.uri, Split(name))
        write_split(make_rows, folder, released, name=title, notes=notes)

    def _open(self) -> None:
        self._datasets = _open_splits(self.uri)
        self._decisions = read_decisions(self.uri)
        self._rows: dict[str, list[int]] = {}
        self._pair_ids: dict[str, list[str]] = {}
        for name, dataset in self._datasets.items():
            rows: list[int] = []
            ids: list[str] = []
            for number, row in enumerate(dataset.scan()):
                pairs = _pairs(row)
                if pairs:
                    rows.append(number)
                    ids += [_id(row, pair) for pair in pairs]
            self._rows[name], self._pair_ids[name] = rows, ids
        if not any(self._rows.values()):
            raise DataError(f"the shards at {self.uri} hold no reasoning question to review")

    def _row(self, split: str, position: int) -> Row:
        rows = self._rows.get(split, [])
        if not 0 <= position < len(rows):
            raise DataError(f"there is no picture {position} in {split!r}; it has {len(rows)}")
        return self._datasets[split].read_row(rows[position])

    def _num_decided(self, ids: list[str]) -> int:
        return sum(self._decisions.about(one) is not None for one in ids)

    def _shown_pair(self, row: Row, pair: Pair) -> dict[str, Any]:
        name = _id(row, pair)
        decision = self._decisions.about(name)
        targets = [
            {
                "index": place,
                "phrase": phrase,
                "category": row.targets[index].category,
                "box": list(row.targets[index].box),
                "area": row.targets[index].area,
                "mask": {
                    "size": row.targets[index].mask["size"],
                    "counts": row.targets[index].mask["counts"].decode("ascii"),
                },
            }
            for place, (index, phrase) in enumerate(zip(pair.targets, pair.phrases, strict=True))
        ]
        return {
            "id": name,
            "question": pair.question,
            "answer": pair.answer,
            "targets": targets,
            "decision": asdict(decision) | {"is_applied": decision.pair_id != name} if decision else None,
        }


def apply_review(uri: str) -> AppliedReview:
    """Writes the decisions at `uri` back into its dataset; see `ReviewFolder.apply`."""
    return ReviewFolder(uri).apply()


def _open_splits(uri: str) -> dict[str, ShardedDataset]:
    if storage.exists(storage.join(uri, DATASET_FILE)):
        dataset = open_shards(uri)
        return {dataset.info.name: dataset}
    folders = {split.value: split_folders(uri, split)[0] for split in Split}
    found = {
        name: open_shards(folder)
        for name, folder in folders.items()
        if storage.exists(storage.join(folder, DATASET_FILE))
    }
    if not found:
        raise DataError(
            f"there is nothing to review at {uri}: neither shards nor the splits of `pixellm muse generate`"
        )
    return found


def _revised_rows(dataset: ShardedDataset, decisions: Decisions) -> Iterator[Row]:
    for row in dataset.scan(with_images=True):
        revised = [decisions.revise(row.image_id, pair) for pair in _pairs(row)]
        kept = [pair for pair in revised if isinstance(pair, Pair)]
        if kept:
            yield muse_row(row, kept)


def _pairs(row: Row) -> list[Pair]:
    return [
        Pair(dialogue.question, dialogue.answer, dialogue.target_ids, dialogue.phrases)
        for dialogue in row.dialogues
        if dialogue.kind == "muse"
    ]


def _id(row: Row, pair: Pair) -> str:
    return pair_id(row.image_id, pair.question, pair.answer)
