"""`pixellm data audit` on genuine photographs: the planted leak is reported, and dropped without touching the rest."""

import json
from dataclasses import replace
from pathlib import Path

from typer.testing import CliRunner

from pixellm.cli import app
from pixellm.jobs.prepare import DEMO_DATA, prepare
from pixellm.platform.data.schema import RowDialogue
from pixellm.platform.data.shards import open_shards, write_shards


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["data", "audit", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_was_planted_is_reported_and_dropped_and_a_second_audit_finds_nothing(tmp_path: Path) -> None:
    prepare("coco", DEMO_DATA, tmp_path / "coco", strict=True)
    rows = list(open_shards(tmp_path / "coco").scan(with_images=True))
    leaked = [replace(row, image_id=f"other-{row.image_id}") for row in rows[:3]]
    write_shards(leaked, tmp_path / "bench", name="bench")
    empty = RowDialogue("vqa", "What is missing?", "")
    first, second = [number for number in range(3, 32) if rows[number].dialogues][:2]
    planted = list(rows)
    planted[first] = replace(rows[first], dialogues=(*rows[first].dialogues, empty))
    planted[second] = replace(rows[second], dialogues=(*rows[second].dialogues, rows[second].dialogues[0]))
    write_shards(planted, tmp_path / "train", name="train")

    checks = [word for name in ("leak", "empty-answer", "repeated-question") for word in ("--check", name)]
    report = json.loads(
        run(tmp_path / "train", "--against", tmp_path / "bench", *checks, "--drop", tmp_path / "clean", "--json")
    )

    (found,) = report["datasets"]
    assert report["benchmark_pictures"] == 3
    assert found["counts"] == {"leak": 3, "empty-answer": 1, "repeated-question": 1}
    assert {text.split()[1] for text in found["listed"]["leak"]} == {row.image_id for row in rows[:3]}
    assert found["listed"]["empty-answer"] == [f"picture {rows[first].image_id} “What is missing?”: there is no answer"]
    assert (found["rows"], found["rows_kept"]) == (32, 29)
    clean = open_shards(tmp_path / "clean" / "train")
    assert list(clean.scan(with_images=True)) == rows[3:]
    assert clean.digest == found["cleaned_digest"]
    again = json.loads(run(tmp_path / "clean" / "train", "--against", tmp_path / "bench", *checks, "--json"))
    assert set(again["datasets"][0]["counts"].values()) == {0}


def test_the_table_names_what_was_found_and_what_was_not_looked_for(tmp_path: Path) -> None:
    prepare("coco", DEMO_DATA, tmp_path / "coco", strict=True)
    text = run(tmp_path / "coco")

    assert text.splitlines()[0].split() == [
        "dataset", "pictures", "leak", "hidden-target", "empty-answer", "repeated-question"]  # fmt: skip
    assert text.splitlines()[1].split()[:3] == ["coco", "32", "0"]
    assert "leaks were not looked for: name the benchmark's shards with --against" in text


def test_an_unknown_check_is_refused_in_words(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["data", "audit", str(tmp_path), "--check", "leaks"])
    assert result.exit_code != 0
    assert "there is no check 'leaks'; known: leak, hidden-target" in str(result.exception)
