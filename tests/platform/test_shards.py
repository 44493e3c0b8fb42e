"""Shards: what goes in comes out, the same input gives the same bytes, damage is named."""

import hashlib
import json
import pickle
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask

from pixellm.errors import DataError
from pixellm.platform.data.schema import SCHEMA, RowDialogue
from pixellm.platform.data.shards import DATASET_FILE, open_shards, write_shards
from tests.platform.data_builders import row, target, vqa


def some_rows(count: int) -> list:
    dialogue = RowDialogue("muse", "What is tame?", "The cat {seg} and the dog {seg}.", (0, 1), ("the cat", "the dog"))
    return [
        row(
            f"picture {number}",
            [target("cat", (number % 9, 3, 20, 12)), target("dog", (30, 1, 50, 33), is_ignore=number % 4 == 0)],
            [dialogue, vqa("Two animals.")] if number % 3 else [],
        )
        for number in range(count)
    ]


def test_rows_come_back_equal_in_any_order_over_parts_and_row_groups(tmp_path: Path) -> None:
    rows = some_rows(45)
    info = write_shards(rows, tmp_path / "set", name="set", rows_per_part=16)
    dataset = pickle.loads(pickle.dumps(open_shards(tmp_path / "set")))

    assert [part.rows for part in info.parts] == [16, 16, 13]
    assert len(dataset) == 45
    assert list(dataset.scan(with_images=True)) == rows
    assert [dataset.read_row(index) for index in (44, 0, 31, 16, 15, 32)] == [rows[i] for i in (44, 0, 31, 16, 15, 32)]
    assert all(scanned.image == b"" and scanned.targets == rows[i].targets for i, scanned in enumerate(dataset.scan()))


def test_the_same_rows_give_the_same_bytes_wherever_they_are_written(tmp_path: Path) -> None:
    first = write_shards(some_rows(20), tmp_path / "a" / "set", name="set", rows_per_part=8)
    second = write_shards(some_rows(20), tmp_path / "b" / "set", name="set", rows_per_part=8)

    assert first == second
    for path in (tmp_path / "a" / "set").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / "set" / path.name).read_bytes()


def test_another_pixel_gives_another_digest(tmp_path: Path) -> None:
    digests = {
        write_shards([row("a", [target("cat", box)])], tmp_path / str(box), name="set").digest
        for box in ((1, 1, 5, 5), (1, 1, 5, 6))
    }

    assert len(digests) == 2


def test_the_description_counts_and_signs_what_is_there(tmp_path: Path) -> None:
    write_shards(some_rows(10), tmp_path / "set", name="pets", version="7", notes={"source": "test"})
    described = json.loads((tmp_path / "set" / DATASET_FILE).read_text())

    assert (described["name"], described["version"], described["schema_version"]) == ("pets", "7", 1)
    assert described["counts"] == {
        "rows": 10,
        "targets": 17,
        "ignore_regions": 3,
        "muse_dialogues": 6,
        "vqa_dialogues": 6,
    }
    assert described["licenses"] == {"CC0": 10}
    assert described["notes"] == {"source": "test"}
    for part in described["parts"]:
        content = (tmp_path / "set" / part["name"]).read_bytes()
        assert (part["sha256"], part["num_bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))


def test_pyarrow_and_pycocotools_read_a_shard_without_us(tmp_path: Path) -> None:
    write_shards(some_rows(3), tmp_path / "set", name="set")
    table = pq.read_table(tmp_path / "set" / "part-00000.parquet")
    record = table.to_pylist()[1]

    assert table.schema.equals(SCHEMA)
    decoded = coco_mask.decode(record["targets"][0]["mask"])
    assert decoded.shape == (40, 60)
    assert decoded.sum() == record["targets"][0]["area"] == 19 * 9


def test_a_failing_source_leaves_the_older_shards(tmp_path: Path) -> None:
    write_shards(some_rows(3), tmp_path / "set", name="set")

    def failing():
        yield from some_rows(9)
        raise DataError("picture 9 is broken")

    with pytest.raises(DataError, match="picture 9"):
        write_shards(failing(), tmp_path / "set", name="set")
    assert len(open_shards(tmp_path / "set")) == 3


def test_damage_and_absence_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no shards at .*pixellm data prepare"):
        open_shards(tmp_path / "nothing")
    with pytest.raises(DataError, match="no row was kept"):
        write_shards([], tmp_path / "set", name="set")

    write_shards(some_rows(20), tmp_path / "set", name="set", rows_per_part=8)
    dataset = open_shards(tmp_path / "set")
    dataset.verify()
    with pytest.raises(DataError, match="has 20 rows, asked for row 20"):
        dataset.read_row(20)

    part = tmp_path / "set" / "part-00001.parquet"
    part.write_bytes(part.read_bytes()[:-100])
    for read in (dataset.verify, lambda: dataset.read_row(9)):
        with pytest.raises(DataError, match=r"part-00001\.parquet"):
            read()


def test_a_newer_or_foreign_description_is_refused(tmp_path: Path) -> None:
    write_shards(some_rows(2), tmp_path / "set", name="set")
    path = tmp_path / "set" / DATASET_FILE
    described = json.loads(path.read_text())

    path.write_text(json.dumps({**described, "schema_version": 99}))
    with pytest.raises(DataError, match="schema version 99"):
        open_shards(tmp_path / "set")
    path.write_text(json.dumps({"hello": 1}))
    with pytest.raises(DataError, match="no description of shards"):
        open_shards(tmp_path / "set")
