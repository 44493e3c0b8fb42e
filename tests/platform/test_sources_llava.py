"""The llava_instruct source: conversations keep their turns, and faulty ones are cut and counted."""

import json
from pathlib import Path
from typing import Any

import pytest

from pixellm.errors import DataError
from pixellm.platform.data.schema import Row
from pixellm.platform.data.shards import open_shards, write_shards
from pixellm.platform.data.sources import get_source
from pixellm.platform.data.sources.base import Ledger
from tests.platform.source_fixtures.llava_instruct import PHOTOGRAPHS, instructions, turns, write
from tests.platform.source_fixtures.refer import DATA


def read(folder: Path, *, strict: bool = False) -> tuple[list[Row], Ledger]:
    ledger = Ledger(strict=strict)
    return list(get_source("llava_instruct").rows(str(folder), ledger)), ledger


def test_every_genuine_question_keeps_its_answer_and_its_place(tmp_path: Path, demo_data: Path) -> None:
    rows, ledger = read(write(tmp_path, instructions()), strict=True)

    assert not ledger.counts
    lines = [json.loads(line) for line in (DATA / "llava_qa.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    for number, row in enumerate(rows):
        short, detail, reasoned = lines[3 * number : 3 * number + 3]
        assert row.image == (demo_data / "images" / PHOTOGRAPHS[number]).read_bytes()
        assert row.image_id == str(int(PHOTOGRAPHS[number].removesuffix(".jpg")))
        assert [(d.turn, d.question, d.answer) for d in row.dialogues] == [
            (0, short["instruction"], short["output"]),
            (1, reasoned["instruction"], reasoned["output"]),
            (0, detail["instruction"], detail["output"]),
        ]
    write_shards(rows, tmp_path / "out", name="llava")
    assert list(open_shards(tmp_path / "out").scan(with_images=True)) == rows


def entry(*pairs: tuple[str, str], image: Any = PHOTOGRAPHS[0]) -> dict[str, Any]:
    return {"id": "1", "image": image, "conversations": turns(*pairs)}


@pytest.mark.parametrize(
    ("fault", "reason", "kept"),
    [
        (entry(("a?", "b"), ("c?", " ")), "question or answer is empty", ["good?", "a?"]),
        (entry(("", "b"), ("c?", "d")), "question or answer is empty", ["good?"]),
        (entry(("a?", "a {seg}"), ("c?", "d")), "text holds a target marker", ["good?"]),
        (entry(("good?", "yes")), "duplicate conversation", ["good?"]),
        ({**entry(("a?", "b")), "conversations": turns(("a?", "b"))[:1]}, "question without an answer", ["good?"]),
        ({**entry(("a?", "b")), "conversations": turns(("a?", "b"))[::-1]},
         "turns of person and model do not alternate", ["good?"]),
        ({**entry(("a?", "b")), "conversations": ["a", "b"]}, "turns of person and model do not alternate", ["good?"]),
        ({"image": PHOTOGRAPHS[0]}, "entry holds no conversation", ["good?"]),
        (entry(("a?", "b"), image="../secret.jpg"), "file name leaves the picture folder", ["good?"]),
        (entry(("a?", "b"), image="000000000001.jpg"), "picture is missing", ["good?"]),
    ],
)  # fmt: skip
def test_a_faulty_turn_ends_its_conversation_under_its_reason(
    tmp_path: Path, fault: dict[str, Any], reason: str, kept: list[str]
) -> None:
    folder = write(tmp_path, [entry(("good?", "yes")), fault])

    (row,), ledger = read(folder)

    assert [dialogue.question for dialogue in row.dialogues] == kept
    assert ledger.counts == {reason: 1}
    with pytest.raises(DataError, match=reason):
        read(folder, strict=True)


def test_a_conversation_without_a_picture_is_no_fault_and_folders_in_names_are_understood(tmp_path: Path) -> None:
    entries = [{"id": "t", "conversations": turns(("a?", "b"))}, entry(("c?", "d"), image=f"coco/{PHOTOGRAPHS[1]}")]
    (row,), ledger = read(write(tmp_path, entries), strict=True)

    assert row.dialogues[0].question == "c?"
    assert ledger.counts == {"conversation without a picture": 1}


def test_missing_parts_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        read(tmp_path / "absent")
    with pytest.raises(DataError, match=r"llava_instruct_150k\.json is missing; --in wants"):
        read(tmp_path)
    (tmp_path / "llava_instruct_150k.json").write_text("[]")
    with pytest.raises(DataError, match="picture folder train2017 is missing"):
        read(tmp_path)
    (tmp_path / "llava_instruct_150k.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match="holds a JSON dict, wanted a list of conversations"):
        read(tmp_path)
