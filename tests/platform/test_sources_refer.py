"""The refCOCO series: published forms read independently (raw JSON, pycocotools); a hostile pickle runs nothing."""

import json
import os
import pickle
import resource
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from pycocotools import mask as coco_mask

from pixellm.errors import DataError
from pixellm.platform.data.plain_pickle import load_plain_pickle
from pixellm.platform.data.schema import Row
from pixellm.platform.data.sources import get_source, with_options
from pixellm.platform.data.sources.base import Ledger
from pixellm.platform.masks import rle_decode
from tests.platform.source_fixtures.coco import DEMO
from tests.platform.source_fixtures.refer import (
    DATA,
    PICTURES,
    build_grefcoco,
    build_refclef,
    build_refer,
    coco_name,
    make_refs,
)

SERIES = {"refcoco": "unc", "refcoco+": "unc", "refcocog": "umd", "refclef": "unc"}


def read(name: str, folder: Path, *, strict: bool = False, **options: Any) -> tuple[list[Row], Ledger]:
    ledger = Ledger(strict=strict, skip_bad_masks=not strict)
    return list(with_options(get_source(name), options).rows(str(folder), ledger)), ledger


def genuine_areas() -> dict[int, int]:
    """Pixels of every packaged instance, by pycocotools alone."""
    content = json.loads((DEMO / "instances.json").read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    return {
        entry["id"]: int(coco_mask.area(coco_mask.merge(coco_mask.frPyObjects(entry["segmentation"], *size))))
        for entry in content["annotations"]
        for size in [sizes[entry["image_id"]]]
    }


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("split", ["train", "val", "testB"])
def test_every_expression_of_the_split_reaches_its_own_mask(name: str, split: str, tmp_path: Path) -> None:
    (build_refclef if name == "refclef" else build_refer(name, SERIES[name]))(tmp_path)
    expected = [e for e in json.loads((DATA / "expressions.json").read_text()) if e["split"] == split]
    areas = genuine_areas()
    rows, ledger = read(name, tmp_path, strict=True, split=split)

    assert not ledger.counts
    assert [int(row.image_id) for row in rows] == sorted({entry["image_id"] for entry in expected})
    found = Counter(
        (int(row.image_id), int(row.targets[dialogue.target_ids[0]].target_id), dialogue.question)
        for row in rows
        for dialogue in row.dialogues
    )
    assert found == Counter((e["image_id"], e["ann_id"], text.lower()) for e in expected for text in e["sentences"])
    for row in rows:
        assert row.source == name
        assert all(dialogue.kind == "referring" and not dialogue.answer for dialogue in row.dialogues)
        for target in row.targets:
            assert target.area == areas[int(target.target_id)] == int(rle_decode(target.mask).sum())


def test_a_target_is_called_by_its_first_expression_that_means_no_other(tmp_path: Path) -> None:
    build_refer("refcoco", "unc")(tmp_path)
    path = tmp_path / "refcoco" / "refs(unc).p"
    refs = pickle.loads(path.read_bytes())
    horses = [ref for ref in refs if ref["ann_id"] in (56944, 273821)]
    for horse in horses:
        horse["sentences"].insert(0, {"raw": "Horse", "sent": "horse", "sent_id": 900, "tokens": ["horse"]})
    path.write_bytes(pickle.dumps(refs))
    (row,), _ = read("refcoco", tmp_path, split="testA")

    phrases = {target.target_id: target.phrase for target in row.targets}
    assert phrases["56944"] == "the horse seen from behind"
    assert phrases["273821"] == "the horse on the right"


def test_expressions_for_several_targets_and_for_none_are_kept_as_such(tmp_path: Path) -> None:
    build_grefcoco(tmp_path)
    (row,), ledger = read("grefcoco", tmp_path, strict=True)

    assert not ledger.counts
    meant = {d.question: sorted(row.targets[i].target_id for i in d.target_ids) for d in row.dialogues}
    assert meant == {
        "the two birds behind the bear": ["36625", "37107"],
        "birds at the top": ["36625", "37107"],
        "the bird in the tree": [],
        "deer": [],
        "the bear": ["586905"],
    }


def test_each_fault_is_counted_under_its_own_reason(tmp_path: Path) -> None:
    build_refer("refcoco", "unc")(tmp_path)
    path = tmp_path / "refcoco" / "refs(unc).p"
    refs = [ref for ref in pickle.loads(path.read_bytes()) if ref["split"] == "train"]
    faulty = [
        (1, 5, ["nowhere"]),
        (229997, 12345, ["no such mask"]),
        (229997, 37163, [" ", "{seg}", "Lowest BIRD in the middle"]),
        (229997, 37163, []),
    ]
    extra = make_refs(
        [{"image_id": image, "ann_id": ann, "split": "train", "sentences": texts} for image, ann, texts in faulty]
    )
    for number, ref in enumerate(extra):
        ref["ref_id"] = 1000 + number
    path.write_bytes(pickle.dumps([*refs, *extra, dict(refs[0]), {"ref_id": "x", "split": "train"}]))
    instances = tmp_path / "refcoco" / "instances.json"
    content = json.loads(instances.read_text())
    broken = {
        36625: [[700, 1, 900, 1, 900, 50]],
        37107: [[5, 5, 6, 6]],
        38146: 7,
    }
    for annotation in content["annotations"]:
        annotation["segmentation"] = broken.get(annotation["id"], annotation["segmentation"])
    content["annotations"].append(dict(next(entry for entry in content["annotations"] if entry["id"] == 37163)))
    content["images"].append(dict(next(entry for entry in content["images"] if entry["id"] == 229997)))
    instances.write_text(json.dumps(content))
    (tmp_path / PICTURES / coco_name(294920)).unlink()
    (tmp_path / PICTURES / coco_name(358083)).write_bytes(b"no picture")

    rows, ledger = read("refcoco", tmp_path)

    assert [row.image_id for row in rows] == ["229997"]
    assert {target.target_id for target in rows[0].targets} == {"37163", "39907", "586905"}
    assert dict(ledger.counts) == {
        "expression entry is malformed": 1,
        "duplicate ref id": 1,
        "duplicate annotation id": 1,
        "duplicate image id": 1,
        "mask outside its picture": 1,
        "degenerate mask": 1,
        "malformed mask": 1,
        "expressions without a usable mask": 4,
        "expression is empty or holds a target marker": 2,
        "expression given twice for the same targets": 1,
        "entry without an expression": 1,
        "picture is missing": 1,
        "picture does not decode": 1,
        "expressions of an unlisted picture": 1,
    }
    with pytest.raises(DataError, match="without --strict to skip it"):
        read("refcoco", tmp_path, strict=True)


def test_missing_parts_and_splits_are_named(tmp_path: Path) -> None:
    def message(**options: Any) -> str:
        with pytest.raises(DataError) as caught:
            read("refcocog", tmp_path / "in", **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "there is no folder" in message()
    (tmp_path / "in").mkdir()
    assert "refs(umd).p is missing; --in wants refcocog/refs(umd).p" in message()
    build_refer("refcocog", "google")(tmp_path / "in")
    assert "there is refs(google).p: see --split-by" in message()
    assert "no split 'test'; give --split testA or testB or train or val" in message(split_by="google", split="test")
    (tmp_path / "in" / "refcocog" / "instances.json").unlink()
    assert "instances.json is missing" in message(split_by="google")
    (tmp_path / "in" / "refcocog" / "instances.json").write_text("{}")
    (tmp_path / "in" / "images").rename(tmp_path / "away")
    assert "the picture folder is missing" in message(split_by="google")


class _Runs:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_hostile_pickle_is_refused_and_nothing_of_it_runs(tmp_path: Path, protocol: int) -> None:
    build_refer("refcoco", "unc")(tmp_path)
    proof = tmp_path / "ran"
    hostile = pickle.dumps([{"ref_id": _Runs(proof)}], protocol=protocol)
    (tmp_path / "refcoco" / "refs(unc).p").write_bytes(hostile)

    with pytest.raises(DataError, match=r"refs\(unc\)\.p wants to import (posix|nt)\.mkdir.*not read further"):
        read("refcoco", tmp_path)
    assert not proof.exists()
    pickle.loads(hostile)
    assert proof.is_dir(), "the pickle is a working attack, so its refusal says something"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is no pickle of plain values"),
        (b"<html>", "is no pickle of plain values"),
        (pickle.dumps([1, 2, 3])[:-2], "is no pickle of plain values"),
        (b"cbuiltins\neval\n(S'1'\ntR.", "wants to import"),
        (b"(S'os'\nibuiltins\ngetattr\n.", "wants to import"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "wants to import os.system"),
        (b"P1\n.", "refers to something outside itself"),
        (b"\x82\x01.", "is no pickle of plain values"),
        (b"(dS'a'\nb.", "is no pickle of plain values"),
        (b"\x80\x02U\x01aU\x01bR.", "is no pickle of plain values"),
        (b"\x80\x02U\x01a)\x81.", "is no pickle of plain values"),
        (b"\x80\x02J\x01.", "is no pickle of plain values"),
    ],
)
def test_other_ways_into_a_pickle_are_closed_too(content: bytes, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_plain_pickle(content, "refs.p")


def test_a_pickle_cannot_ask_for_memory_that_it_does_not_fill() -> None:
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    try:
        assert load_plain_pickle(b"\x80\x02]r\xff\xff\xff\x7f.", "refs.p") == []
        with pytest.raises(DataError, match=r"asks for more memory|is no pickle"):
            load_plain_pickle(b"\x80\x05\x96\x00\x00\x00\x00\x10\x00\x00\x00.", "refs.p")
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


def test_plain_values_of_every_protocol_and_of_python_2_are_read() -> None:
    value = [{"ref_id": 1, "sents": [{"sent": "naïve", "tokens": ("a", None)}], "f": 1.5, "big": 10**30, "b": True}]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert load_plain_pickle(pickle.dumps(value, protocol), "refs.p") == value
    assert load_plain_pickle(b"(lp0\nS'caf\\xc3\\xa9'\np1\naI4\na.", "refs.p") == ["café", 4]
