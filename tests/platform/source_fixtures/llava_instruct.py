"""llava_instruct: genuine questions and answers (`tests/data/llava_qa.jsonl`) as conversations in the 150k's form,
on three of the packaged photographs (whose content they do not describe)."""

import json
import shutil
from pathlib import Path
from typing import Any

from tests.platform.source_fixtures import SourceFixture
from tests.platform.source_fixtures.coco import DEMO
from tests.platform.source_fixtures.refer import DATA

PHOTOGRAPHS = ("000000229997.jpg", "000000252219.jpg", "000000458756.jpg")


def turns(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    """Turns as published: the picture's marker stands in the first question."""
    said = [{"from": who, "value": text} for pair in pairs for who, text in zip(("human", "gpt"), pair, strict=True)]
    said[0]["value"] = f"<image>\n{said[0]['value']}"
    return said


def instructions() -> list[dict[str, Any]]:
    """For each photograph one conversation of two turns and one of a single turn."""
    lines = [json.loads(line) for line in (DATA / "llava_qa.jsonl").read_text().splitlines()]
    entries = []
    for photograph, start in zip(PHOTOGRAPHS, range(0, 9, 3), strict=True):
        short, detail, reasoned = ((line["instruction"], line["output"]) for line in lines[start : start + 3])
        common = {"id": photograph.removesuffix(".jpg"), "image": photograph}
        entries.append({**common, "conversations": turns(short, reasoned)})
        entries.append({**common, "conversations": turns(detail)})
    return entries


def write(folder: Path, entries: list[dict[str, Any]]) -> Path:
    (folder / "train2017").mkdir(parents=True)
    for photograph in PHOTOGRAPHS:
        shutil.copy(DEMO / "images" / photograph, folder / "train2017" / photograph)
    (folder / "llava_instruct_150k.json").write_text(json.dumps(entries))
    return folder


FIXTURES = (SourceFixture("llava_instruct", lambda folder: write(folder, instructions()), rows=3, targets=0),)
