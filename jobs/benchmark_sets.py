"""Benchmark sets out of prepared shards: multi-referring questions; train, val and test by few and many targets."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pixellm.errors import ConfigError, DataError
from pixellm.platform import storage
from pixellm.platform.data.benchmark_sets import FEW_TARGETS, assign_splits, keep_questions, multi_referring_row
from pixellm.platform.data.schema import Row
from pixellm.platform.data.shards import DatasetInfo, ShardedDataset, open_shards, write_shards


@dataclass(frozen=True, slots=True)
class MadeSet:
    """A set of shards that was made from others.

    Attributes:
        name: of the set.
        uri: where it is.
        digest: of its content.
        pictures: rows.
        questions: by number of targets.
    """

    name: str
    uri: str
    digest: str
    pictures: int
    questions: dict[int, int]

    def to_text(self) -> str:
        """One line for a terminal."""
        questions = ", ".join(f"{count} with {targets}" for targets, count in self.questions.items()) or "none with"
        return (
            f"{self.name:10} {self.pictures} pictures, {sum(self.questions.values())} questions ({questions} targets), "
            f"digest {self.digest[:12]}, {self.uri}"
        )


@dataclass(frozen=True, slots=True)
class MadeSets:
    """What was made. `left_out`: pictures of the source that are in none of the sets, by reason."""

    source_digest: str
    seed: int
    sets: tuple[MadeSet, ...]
    left_out: dict[str, int]

    def to_json_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def to_text(self) -> str:
        """Lines for a terminal."""
        lines = [made.to_text() for made in self.sets]
        return "\n".join([*lines, *(f"left out {count}: {reason}" for reason, count in self.left_out.items())])


def make_multi_referring(
    uri: str | Path, out_uri: str | Path, *, min_targets: int = 3, max_targets: int = 6, seed: int = 0
) -> MadeSets:
    """Shards of a refCOCO-like split → shards with questions for several targets (paper Sec. 5.2, Table 2).

    Args:
        uri: shards with "referring" dialogues.
        out_uri: the folder to write; older shards there are replaced.
        min_targets: of a question.
        max_targets: likewise.
        seed: of the choice; the same rows and seed give the same digest.

    Raises:
        ConfigError: the bounds are no range.
        DataError: no picture has enough targets with expressions.
    """
    if not 1 <= min_targets <= max_targets:
        raise ConfigError(f"got --min-targets {min_targets} --max-targets {max_targets}; wanted 1 ≤ min ≤ max")
    dataset = open_shards(uri)
    left_out: Counter[str] = Counter()

    def rows() -> Iterator[Row]:
        for row in dataset.scan(with_images=True):
            made = multi_referring_row(row, seed=seed, min_targets=min_targets, max_targets=max_targets)
            if made is not None:
                yield made
            else:
                left_out[f"picture has fewer than {min_targets} targets with an expression of their own"] += 1

    notes = {"made_from": dataset.digest, "seed": seed, "min_targets": min_targets, "max_targets": max_targets}
    made = _write(rows(), out_uri, Path(str(out_uri)).name, notes)
    return MadeSets(dataset.digest, seed, (made,), dict(left_out))


def make_splits(
    uri: str | Path,
    out_uri: str | Path,
    *,
    val: float,
    test: float,
    few: int = FEW_TARGETS,
    seed: int = 0,
) -> MadeSets:
    """Shards → `train`, `val`, `test` with no picture in two of them, and the questions of `test` in two parts.

    Args:
        uri: shards with written questions (MUSE).
        out_uri: the folder under which the sets are written: `train/`, `val/`, `test/`, and, from the pictures of
            `test`, `test_few/` (questions with 1 to `few` targets) and `test_many/` (with more).
        val: share of the pictures, 0..1.
        test: likewise.
        few: targets of a question that still are few.
        seed: another seed gives other splits.

    Raises:
        ConfigError: the shares leave a split empty.
        DataError: no question of `test` has few, or many, targets; nothing was written.
    """
    dataset = open_shards(uri)
    sizes = [(row.image_id, [len(dialogue.target_ids) for dialogue in row.dialogues]) for row in dataset.scan()]
    image_ids = [image_id for image_id, _ in sizes]
    split_of = assign_splits(image_ids, {"val": val, "test": test}, seed)
    tested = [size for image_id, of_row in sizes if split_of[image_id] == "test" for size in of_row if size]
    if not tested or not min(tested) <= few < max(tested):
        found = f"{min(tested)} to {max(tested)} targets" if tested else "no target"
        raise DataError(
            f"the questions of test have {found}, wanted some with up to {few} and some with more; give --test a "
            "larger share, another --seed, or another --few"
        )
    notes = {"made_from": dataset.digest, "seed": seed, "val": val, "test": test, "few": few}
    sets: list[MadeSet] = []
    for name in ("train", "val", "test", "test_few", "test_many"):
        numbers = [n for n, image_id in enumerate(image_ids) if split_of[image_id] == name.partition("_")[0]]
        rows = _part(dataset, numbers, name, few)
        sets.append(_write(rows, storage.join(out_uri, name), name, {**notes, "split": name}))
    return MadeSets(dataset.digest, seed, tuple(sets), {})


def _part(dataset: ShardedDataset, numbers: list[int], name: str, few: int) -> Iterator[Row]:
    for number in numbers:
        whole = dataset.read_row(number)
        row: Row | None = whole
        if name == "test_few":
            row = keep_questions(whole, max_targets=few)
        elif name == "test_many":
            row = keep_questions(whole, min_targets=few + 1)
        if row is not None:
            yield row


def _write(rows: Iterator[Row], uri: str | Path, name: str, notes: dict[str, Any]) -> MadeSet:
    questions: Counter[int] = Counter()

    def counted() -> Iterator[Row]:
        for row in rows:
            questions.update(len(dialogue.target_ids) for dialogue in row.dialogues)
            yield row

    info: DatasetInfo = write_shards(counted(), uri, name=name, notes=notes)
    return MadeSet(name, str(uri), info.digest, info.counts["rows"], dict(sorted(questions.items())))
