"""The muse source: the released JSON read independently, and answers that do not fit their masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pixellm.errors import DataError
from pixellm.platform.data.schema import Row
from pixellm.platform.data.sources import get_source
from pixellm.platform.data.sources.base import Ledger
from pixellm.platform.masks import rle_decode
from tests.platform.data_builders import jpeg


def read(folder: Path, *, strict: bool = False) -> tuple[list[Row], Ledger]:
    ledger = Ledger(strict=strict, skip_bad_masks=True)
    return list(get_source("muse").rows(str(folder), ledger)), ledger


def answer(x: float = 2, **fields: Any) -> dict[str, Any]:
    part = {"segmentation": [[x, 2, x + 9, 2, x + 9, 12, x, 12]], "category_name": "cat", "bbox": [x, 2, 9, 10]}
    return {**part, **fields}


def write(folder: Path, *entries: dict[str, Any]) -> Path:
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for entry in entries:
        name = (entry.get("file_name") or entry.get("coco_url", "x")).rpartition("/")[2]
        (folder / "images" / name).write_bytes(jpeg(40, 60))
    (folder / "muse.json").write_text(json.dumps(list(entries)))
    return folder


def entry(name: str = "a.jpg", **fields: Any) -> dict[str, Any]:
    values = {"file_name": name, "height": 40, "width": 60, "questions": ["Who sleeps?"], "answers": [[answer()]]}
    return {**values, **fields}


def test_every_question_keeps_its_words_and_each_marker_its_mask(demo_data: Path) -> None:
    released = json.loads((demo_data / "muse.json").read_text())
    rows, ledger = read(demo_data, strict=True)

    assert not ledger.counts
    assert len(rows) == len(released)
    for item, row in zip(released, rows, strict=True):
        assert row.image == (demo_data / "images" / item["file_name"]).read_bytes()
        assert row.image_id == str(int(item["file_name"].removesuffix(".jpg")))
        assert "http" in row.license
        assert len(row.dialogues) == len(item["questions"])
        for dialogue, question, text, parts in zip(
            row.dialogues, item["questions"], item["text_answers"], item["answers"], strict=True
        ):
            assert (dialogue.kind, dialogue.question, dialogue.answer) == ("muse", question, text)
            assert dialogue.answer.count("{seg}") == len(dialogue.target_ids) == len(parts)
            assert list(dialogue.phrases) == [part["rephrased_name"] for part in parts]
            for index, part in zip(dialogue.target_ids, parts, strict=True):
                polygons = coco_mask.frPyObjects(part["segmentation"], item["height"], item["width"])
                expected = coco_mask.decode(coco_mask.merge(polygons)).astype(bool)
                assert np.array_equal(rle_decode(row.targets[index].mask), expected)


def test_a_target_of_two_answers_is_stored_once(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        entry(questions=["Who?", "Who else?"], answers=[[answer(2), answer(30)], [answer(30)]], text_answers=None),
    )
    (row,), _ = read(folder, strict=True)

    assert len(row.targets) == 2
    assert [dialogue.target_ids for dialogue in row.dialogues] == [(0, 1), (1,)]


def test_without_a_written_answer_the_descriptions_are_listed(tmp_path: Path) -> None:
    parts = [answer(2, rephrased_name="the sleepy cat"), answer(30)]
    (row,), _ = read(write(tmp_path, entry(answers=[parts])), strict=True)

    assert row.dialogues[0].answer == "The sleepy cat {seg}, cat {seg}."


def test_the_picture_may_be_named_by_its_url_only(tmp_path: Path) -> None:
    item = entry(coco_url="http://images.cocodataset.org/train2017/000000000042.jpg")
    del item["file_name"]
    (row,), _ = read(write(tmp_path, item), strict=True)

    assert (row.image_id, row.license) == ("42", "unknown")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"text_answers": ["It is {seg} and {seg}."]}, "answer's markers do not match its targets"),
        ({"text_answers": ["It is here."]}, "answer's markers do not match its targets"),
        ({"questions": [" "]}, "question is empty or holds a target marker"),
        ({"questions": ["Where is {seg}?"]}, "question is empty or holds a target marker"),
        ({"questions": ["a", "b"]}, "questions and answers do not pair up"),
        ({"answers": [[]]}, "answer names no target"),
        ({"answers": ["x"]}, "answer names no target"),
        ({"answers": [[answer(55)]]}, "mask outside its picture"),
        ({"height": 41}, "picture has another size than its annotation says"),
        ({"file_name": None}, "entry names no picture"),
    ],
)
def test_a_faulty_entry_is_skipped_under_its_reason_or_raised(tmp_path: Path, fields: dict, reason: str) -> None:
    folder = write(tmp_path, entry("good.jpg"), entry("bad.jpg", **fields))

    rows, ledger = read(folder)

    assert [row.image_id for row in rows] == ["good"]
    assert ledger.counts[reason] == 1
    with pytest.raises(DataError, match=reason):
        read(folder, strict=True)


def test_a_picture_listed_twice_is_taken_once(tmp_path: Path) -> None:
    rows, ledger = read(write(tmp_path, entry(), entry()))

    assert len(rows) == 1
    assert ledger.counts == {"duplicate picture": 1}


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match=r"muse\.json is missing; --in wants images/ and muse\.json"):
        read(tmp_path)
    write(tmp_path)
    (tmp_path / "muse.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="is not a list of objects"):
        read(tmp_path)
