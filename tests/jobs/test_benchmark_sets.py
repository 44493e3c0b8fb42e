"""`pixellm data split` and `data multi-referring` on genuine photographs: shards that can be checked by hand."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pixellm.cli import app
from pixellm.errors import DataError
from pixellm.jobs.benchmark_sets import make_multi_referring
from pixellm.jobs.prepare import DEMO_DATA, prepare
from pixellm.platform.data.shards import open_shards
from tests.platform.source_fixtures.refer import DATA, build_refer


def run(*arguments: object) -> dict:
    result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_muse_is_split_without_a_picture_in_two_splits_and_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    prepare("muse", DEMO_DATA, tmp_path / "muse", strict=True)
    split = ("data", "split", tmp_path / "muse", "--val", 0.25, "--test", 0.5, "--few", 2)
    made = run(*split, "--out", tmp_path / "a")
    again = run(*split, "--out", tmp_path / "b")
    other = run(*split, "--out", tmp_path / "c", "--seed", 1)

    digests = [[one["digest"] for one in report["sets"]] for report in (made, again, other)]
    assert digests[0] == digests[1]
    assert not set(digests[0]) & set(digests[2])
    rows = {one["name"]: list(open_shards(one["uri"]).scan(with_images=True)) for one in made["sets"]}
    pictures = {name: {row.image_id for row in of_set} for name, of_set in rows.items()}
    assert [len(pictures[name]) for name in ("train", "val", "test")] == [8, 8, 16]
    assert len(pictures["train"] | pictures["val"] | pictures["test"]) == 32
    released = json.loads((DEMO_DATA / "muse.json").read_text())
    sizes = {str(int(item["file_name"][:-4])): [len(parts) for parts in item["answers"]] for item in released}
    few = sorted(n for image_id in pictures["test"] for n in sizes[image_id] if n <= 2)
    many = sorted(n for image_id in pictures["test"] for n in sizes[image_id] if n > 2)
    assert few
    assert many
    for name, expected in (("test_few", few), ("test_many", many), ("test", sorted(few + many))):
        assert sorted(len(d.target_ids) for row in rows[name] for d in row.dialogues) == expected


def test_multi_referring_asks_for_every_genuine_target_of_a_picture(tmp_path: Path) -> None:
    build_refer("refcoco", "unc")(tmp_path / "in")
    prepare("refcoco", tmp_path / "in", tmp_path / "val", options={"split": "val"}, strict=True)
    made = run("data", "multi-referring", tmp_path / "val", "--out", tmp_path / "mrefcoco")

    (one,) = made["sets"]
    assert (one["name"], one["pictures"], made["left_out"]) == ("mrefcoco", 1, {})
    (row,) = open_shards(tmp_path / "mrefcoco").scan(with_images=True)
    expected = {
        text.lower(): entry["ann_id"]
        for entry in json.loads((DATA / "expressions.json").read_text())
        if entry["split"] == "val"
        for text in entry["sentences"]
    }
    assert row.source == "mrefcoco"
    assert [len(dialogue.target_ids) for dialogue in row.dialogues] == [4, 3]
    for dialogue in row.dialogues:
        said = {
            phrase: int(row.targets[i].target_id)
            for phrase, i in zip(dialogue.phrases, dialogue.target_ids, strict=True)
        }
        assert said.items() <= expected.items()
    again = make_multi_referring(tmp_path / "val", tmp_path / "again")
    assert again.sets[0].digest == one["digest"]
    assert make_multi_referring(tmp_path / "val", tmp_path / "other", seed=5).sets[0].digest != one["digest"]
    with pytest.raises(DataError, match="nothing to write"):
        make_multi_referring(tmp_path / "val", tmp_path / "none", min_targets=5)
