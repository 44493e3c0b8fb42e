"""Evaluation of a model folder on the demo's photographs: the same questions every time, every figure accounted for."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from micro_run import micro_settings

from pixellm.errors import ConfigError, DataError, ModelLoadError
from pixellm.jobs.evaluate.answers import ForcedAnswers
from pixellm.jobs.evaluate.blocks import Mode
from pixellm.jobs.evaluate.job import EvaluationOptions, evaluate_suite
from pixellm.jobs.evaluate.questions import iterate_questions
from pixellm.jobs.evaluate.run import evaluate_after_training
from pixellm.jobs.train.build import build_model, build_processor
from pixellm.platform.data.compose import ComposeLimits
from pixellm.platform.data.shards import open_shards

LIMITS = ComposeLimits(max_targets=3, min_target_share=0.01)


@pytest.fixture(scope="module")
def model_dir(demo_shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained very small model."""
    folder = tmp_path_factory.mktemp("model")
    settings = micro_settings(demo_shards, folder)
    build_model(settings).save_pretrained(folder)
    build_processor(settings).save_pretrained(folder)
    return folder


def test_the_questions_are_the_same_every_time_and_ask_for_several_targets(demo_shards: dict[str, str]) -> None:
    first = list(iterate_questions(demo_shards["segmentation"], "segmentation", LIMITS))
    again = list(iterate_questions(demo_shards["segmentation"], "segmentation", LIMITS))
    assert [(q.sample_id, q.prompt, q.answer) for q in first] == [(q.sample_id, q.prompt, q.answer) for q in again]
    assert len({q.sample_id for q in first}) == len(first) > 20
    assert np.mean([len(q.masks) > 1 for q in first]) > 0.8
    for question in first:
        assert question.answer.count("{seg}") == len(question.masks) == len(question.phrases) <= 3
        assert all(mask.mean() >= 0.01 for mask in question.masks)


def test_every_written_muse_question_is_asked_once(demo_shards: dict[str, str]) -> None:
    wide = ComposeLimits(max_targets=20)
    asked = [(q.prompt, q.answer) for q in iterate_questions(demo_shards["muse"], "muse", wide)]
    written = [(d.question, d.answer) for row in open_shards(demo_shards["muse"]).scan() for d in row.dialogues]
    assert sorted(asked) == sorted(written)


def test_a_limit_cuts_the_questions_and_an_impossible_one_says_so(demo_shards: dict[str, str]) -> None:
    assert len(list(iterate_questions(demo_shards["muse"], "muse", LIMITS, limit=5))) == 5
    with pytest.raises(DataError, match=r"no row of .* can give a muse question"):
        list(iterate_questions(demo_shards["segmentation"], "muse", LIMITS))


@pytest.mark.parametrize("mode", ["generated", "forced"])
@pytest.mark.parametrize("suite", ["segmentation", "muse"])
def test_the_metrics_are_those_of_the_samples_file(
    model_dir: Path, demo_shards: dict[str, str], tmp_path: Path, mode: Mode, suite: str
) -> None:
    options = EvaluationOptions(mode=mode, limit=5, batch_size=2, with_report=False)
    result = evaluate_suite(model_dir, demo_shards[suite], tmp_path, suite, options)
    rows = pq.read_table(tmp_path / "samples.parquet").to_pylist()
    assert len(rows) == 5
    assert result.metrics["giou"] == pytest.approx(np.mean([iou for row in rows for iou in row["ious"]]))
    unions = sum(sum(row["unions"]) for row in rows)
    assert result.metrics["ciou"] == pytest.approx(sum(sum(row["intersections"]) for row in rows) / unions)
    assert result.metrics["mean_targets_asked"] == sum(row["targets_asked"] for row in rows) / 5
    if mode == "forced":
        assert all(row["targets_returned"] == row["targets_asked"] for row in rows)
        assert result.metrics["count_accuracy"] == 1
        assert "[1]" in rows[0]["answer"]
    assert json.loads((tmp_path / "metrics.json").read_text())["metrics"] == result.metrics
    assert "giou" in result.to_text()


def test_teacher_forced_masks_do_not_depend_on_the_batch(model_dir: Path, demo_shards: dict[str, str]) -> None:
    questions = list(iterate_questions(demo_shards["segmentation"], "segmentation", LIMITS, limit=4))
    answerer = ForcedAnswers(model_dir)
    together = answerer.answer(questions)
    alone = [answerer.answer([question])[0] for question in questions]
    for one, other, question in zip(together, alone, questions, strict=True):
        assert len(one.masks) == len(question.masks)
        assert all(mask.shape == question.masks[0].shape for mask in one.masks)
        differing = [np.mean(a != b) for a, b in zip(one.masks, other.masks, strict=True)]
        assert max(differing) < 1e-3  # padding changes the last bits of the logits


def test_after_training_every_source_with_masks_is_asked(
    model_dir: Path, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    settings = micro_settings(demo_shards, tmp_path)
    result = evaluate_after_training(settings, model_dir, tmp_path / "out")
    assert result.metrics["num_questions"] == 8
    assert {"giou_segmentation", "giou_muse"} <= result.metrics.keys()
    chosen = settings.evaluate.model_copy(update={"uri": demo_shards["muse"], "suite": "muse", "limit": 3})
    only = evaluate_after_training(settings.model_copy(update={"evaluate": chosen}), model_dir, tmp_path / "muse")
    assert only.metrics["num_questions"] == 3


def test_a_missing_model_missing_shards_and_a_run_without_masks_are_refused(
    model_dir: Path, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ModelLoadError, match="does not exist"):
        evaluate_suite(tmp_path / "nothing", demo_shards["muse"], tmp_path, "muse")
    with pytest.raises(DataError, match="pixellm data prepare"):
        evaluate_suite(model_dir, str(tmp_path / "nothing"), tmp_path, "muse")
    vqa = micro_settings({"vqa": demo_shards["vqa"]}, tmp_path)
    with pytest.raises(ConfigError, match=r"set evaluate\.uri"):
        evaluate_after_training(vqa, model_dir, tmp_path)
