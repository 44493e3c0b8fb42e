"""Batch prediction: every input comes out once, as an answer or in quarantine, however often the job is interrupted."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from pycocotools import mask as coco_mask

from pixellm.errors import ConfigError, DataError, ModelLoadError, ServingError
from pixellm.jobs.batch.run import BatchProgress, predict_batch
from pixellm.jobs.batch.worker import BatchPlan, open_engine
from pixellm.jobs.predict import predict
from pixellm.platform.data.shards import open_shards

QUESTION = "Segment everything."


@pytest.fixture
def folder(demo_data: Path, tmp_path: Path) -> Path:
    """Four photographs at two depths, three files that are none, and two that nobody asked about."""
    photos = [path.read_bytes() for path in sorted((demo_data / "images").iterdir())[:4]]
    contents = dict(zip(("a/1.jpg", "a/2.JPG", "b/c/3.jpg", "4.jpg"), photos, strict=True))
    contents |= {"a/empty.png": b"", "b/text.jpg": b"no picture", "b/truncated.jpg": photos[0][:3000]}
    contents |= {"notes.txt": b"", ".hidden/5.jpg": photos[0]}
    for name, content in contents.items():
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "pictures"


@pytest.fixture
def plan(folder: Path, masks_model_dir: Path, tmp_path: Path) -> BatchPlan:
    """Blocks of two; seven inputs, so the last block is short."""
    out = str(tmp_path / "out")
    return BatchPlan(str(folder), QUESTION, str(masks_model_dir), out, block_size=2, max_new_tokens=20, batch_size=2)


def rows(plan: BatchPlan, kind: str) -> list[dict[str, Any]]:
    parts = sorted((Path(plan.out_uri) / kind).iterdir())
    return [row for part in parts for row in pq.read_table(part).to_pylist()]


def test_each_input_is_answered_or_quarantined_with_its_reason(plan: BatchPlan, folder: Path, tmp_path: Path) -> None:
    seen: list[BatchProgress] = []
    result = predict_batch(plan, on_progress=seen.append)
    assert (result.inputs, result.answered, result.quarantined, result.kinds) == (7, 4, 3, {"damaged": 3})
    answers, quarantine = rows(plan, "answers"), rows(plan, "quarantine")
    assert sorted(row["input"] for row in answers) == ["4.jpg", "a/1.jpg", "a/2.JPG", "b/c/3.jpg"]
    assert sorted(row["input"] for row in quarantine) == ["a/empty.png", "b/text.jpg", "b/truncated.jpg"]
    assert sorted(row["number"] for row in answers + quarantine) == list(range(7))
    assert all(row["reason"] for row in quarantine)
    assert [progress.done for progress in seen] == [0, 2, 4, 6, 7]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == result.to_json_dict()
    assert "7 pictures: 4 answered, 3 quarantined" in result.to_text()
    few = predict(
        [folder / row["input"] for row in answers], QUESTION, plan.model_ref, tmp_path / "few", max_new_tokens=20
    )
    for row, alone in zip(answers, few.predictions, strict=True):
        assert row["text"] == alone.text
        assert len(row["targets"]) == len(alone.targets) > 0
        for target, same in zip(row["targets"], alone.targets, strict=True):
            mask, expected = coco_mask.decode(target["mask"]), coco_mask.decode(same.rle)
            assert mask.sum() == target["area"]
            assert (mask != expected).mean() < 0.01  # logits differ by 1e-4 with what is answered beside them


class _StopsAfter:
    """An engine that answers some pictures and then is down for good."""

    def __init__(self, plan: BatchPlan, asks: int) -> None:
        self._engine, self._left = open_engine(plan), asks

    def submit(self, request: Any) -> Any:
        self._left -= 1
        if self._left < 0:
            raise ServingError("the engine is down")
        return self._engine.submit(request)

    def close(self) -> None:
        self._engine.close()


def test_what_is_done_is_not_done_again_and_a_fault_of_the_engine_quarantines_nothing(plan: BatchPlan) -> None:
    plan = replace(plan, batch_size=1)
    with pytest.raises(ServingError, match="the engine is down"):
        predict_batch(plan, open_engine=lambda plan: _StopsAfter(plan, 5))
    before = {path.name: path.stat().st_mtime_ns for path in (Path(plan.out_uri) / "answers").iterdir()}
    assert 0 < len(before) < 4
    assert not (Path(plan.out_uri) / "summary.json").exists()
    result = predict_batch(plan)
    assert (result.answered, result.quarantined, result.found_done) == (4, 3, 2 * len(before))
    after = {path.name: path.stat().st_mtime_ns for path in (Path(plan.out_uri) / "answers").iterdir()}
    assert {name: after[name] for name in before} == before

    def refuse(_plan: BatchPlan) -> Any:
        raise AssertionError("nothing is left to do")

    assert predict_batch(plan, open_engine=refuse).found_done == 7


def test_a_folder_is_listed_once_and_the_quarantined_can_be_tried_again(plan: BatchPlan, folder: Path) -> None:
    predict_batch(plan)
    whole = (folder / "4.jpg").read_bytes()
    (folder / "new.jpg").write_bytes(whole)
    (folder / "b" / "truncated.jpg").write_bytes(whole)
    assert predict_batch(plan).kinds == {"damaged": 3}
    result = predict_batch(plan, retry_quarantined=True)
    assert (result.inputs, result.answered, result.kinds) == (7, 5, {"damaged": 2})
    assert len({row["number"] for row in rows(plan, "answers") + rows(plan, "quarantine")}) == 7


def test_a_picture_that_ended_its_process_twice_is_quarantined_and_its_neighbour_is_answered(plan: BatchPlan) -> None:
    begun = Path(plan.out_uri) / "begun"
    begun.mkdir(parents=True)
    # What two workers that died over whatever was in block 0, and two that died over one picture of it, leave behind.
    (begun / "block-0000000.json").write_text(json.dumps({"starts": 4, "suspects": {"a/1.jpg": 2}}))
    result = predict_batch(plan)
    assert result.kinds == {"damaged": 3, "fatal": 1}
    [fatal] = [row for row in rows(plan, "quarantine") if row["kind"] == "fatal"]
    assert (fatal["input"], "ended 2 times" in fatal["reason"]) == ("a/1.jpg", True)
    assert "4.jpg" in {row["input"] for row in rows(plan, "answers")}
    assert not begun.exists()


def test_the_pictures_of_shards_are_asked_about_in_their_order(plan: BatchPlan, demo_shards: dict[str, str]) -> None:
    plan = replace(plan, input_uri=demo_shards["segmentation"], block_size=20, max_new_tokens=1)
    result = predict_batch(plan)
    known = [f"{row.source}/{row.image_id}" for row in open_shards(demo_shards["segmentation"]).scan()]
    assert [row["input"] for row in rows(plan, "answers")] == known
    assert (result.answered, result.quarantined) == (len(known), 0)


def test_what_cannot_be_begun_is_refused_and_the_right_command_may_go_there(plan: BatchPlan, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="empty question"):
        predict_batch(replace(plan, question=" "))
    with pytest.raises(DataError, match="there is no folder"):
        predict_batch(replace(plan, input_uri=str(tmp_path / "absent")))
    with pytest.raises(DataError, match="holds no picture"):
        predict_batch(replace(plan, input_uri=plan.model_ref))
    with pytest.raises(ModelLoadError, match="does not exist"):
        predict_batch(replace(plan, model_ref=str(tmp_path / "absent")))
    with pytest.raises(DataError, match="text tokens"):  # the question's fault: no picture is quarantined for it
        predict_batch(replace(plan, question="why " * 5000, block_size=3))
    assert not (tmp_path / "out" / "answers").exists()
    assert predict_batch(plan).answered == 4
    with pytest.raises(ConfigError, match="holds a prediction with another question, threshold"):
        predict_batch(replace(plan, question="And now?", threshold=0.4))


def test_cost_counts_this_attempt_only() -> None:
    progress = BatchProgress(done=600, total=1000, quarantined=0, elapsed_s=1800, done_here=100)
    assert progress.cost(per_hour=4.0) == (2.0, 10.0)
