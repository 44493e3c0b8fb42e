"""Every suite on answers whose figures are known by hand; resume, actors, and a killed actor."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from evaluate_case import BOXES, KnownAnswers, box_mask, write_case

from pixellm.errors import ConfigError, DataError
from pixellm.jobs.evaluate.compare import compare
from pixellm.jobs.evaluate.job import Evaluation, EvaluationOptions, evaluate_suite
from pixellm.jobs.evaluate.samples import sample_row
from pixellm.jobs.evaluate.suites import SUITES, find_suite, question_places, questions_of
from pixellm.jobs.evaluate.summary import summarize
from pixellm.jobs.evaluate.types import Answer
from pixellm.platform.data.shards import open_shards
from pixellm.platform.masks import rle_encode
from pixellm.platform.settings import Settings

QUICK = EvaluationOptions(with_report=False, batch_size=2)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Six pictures with a question for every suite."""
    return write_case(tmp_path_factory.mktemp("case") / "shards")


def _run(shards: str, out: Path, suite: str, share: float, options: EvaluationOptions = QUICK) -> Evaluation:
    return evaluate_suite("known", shards, out, suite, options, open_answerer=KnownAnswers(share))


@pytest.mark.parametrize("suite", SUITES)
def test_the_truth_gives_exactly_100_and_nothing_gives_0(shards: str, tmp_path: Path, suite: str) -> None:
    right = _run(shards, tmp_path / "right", suite, 1.0)
    for name in ("giou", "ciou", "precision", "recall", "pq", "count_accuracy"):
        assert right.metrics[name] == 1.0
        assert right.intervals[name] == (1.0, 1.0)
    nothing = _run(shards, tmp_path / "nothing", suite, 0.0)
    for name in ("giou", "ciou", "recall", "pq", "count_accuracy"):
        assert nothing.metrics[name] == 0.0
    assert "precision" not in nothing.metrics  # nothing was returned: 0 / 0
    assert nothing.metrics["mean_targets_returned"] == 0.0


@pytest.mark.parametrize("suite", [name for name in SUITES if name != "segmentation"])
def test_one_target_of_two_gives_the_value_computed_by_hand(shards: str, tmp_path: Path, suite: str) -> None:
    # 6 pictures with one question of two targets, 800 pixels each, the first of which is found exactly: matched, the
    # places are (1, 0) and the pixels 800 of 1600; merged, 800 of 1600 too. ReasonSeg asks both questions of a picture.
    half = _run(shards, tmp_path / "half", suite, 0.5)
    assert half.questions == (12 if suite == "reasonseg" else 6)
    assert half.metrics["giou"] == half.metrics["ciou"] == 0.5
    assert half.metrics["recall"] == 0.5
    assert half.metrics["precision"] == 1.0
    # PQ: 1 hit of IoU 1 over 1 + 0/2 + 1/2
    assert half.metrics["pq"] == pytest.approx(1 / 1.5)
    assert half.metrics["sq"] == 1.0
    assert half.metrics["count_accuracy"] == 0.0
    assert half.breakdowns["targets"]["2"]["questions"] == half.questions
    assert half.breakdowns["area"]["5 to 20 %"]["targets"] == 2 * half.questions  # 800 of 6000 pixels
    assert half.breakdowns["few or many"].keys() == {"up to 3 targets"}


def test_questions_are_the_same_every_time_and_carry_their_type(shards: str) -> None:
    dataset = open_shards(shards)
    suite = find_suite("reasonseg")
    places = question_places(dataset, suite)
    assert places == [(row, order) for row in range(6) for order in (0, 1)]
    asked = list(questions_of(dataset.read_row(0), 0, suite, [0, 1]))
    assert [a.kind for a in asked] == ["reasoning: how", "referring"]
    assert asked[1].prompt.startswith("Please segment")
    assert "both things on the left" in asked[1].prompt
    assert [a.sample_id for a in asked] == ["case/000#0", "case/000#1"]
    assert question_places(dataset, suite, 5) == places[:5]


def test_a_stopped_evaluation_goes_on_and_asks_no_block_twice(shards: str, tmp_path: Path) -> None:
    log = tmp_path / "log"

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done >= total - 2:
            raise StoppedError

    known = KnownAnswers(0.5, log)
    with pytest.raises(StoppedError):
        evaluate_suite("known", shards, tmp_path / "out", "muse", QUICK, open_answerer=known, on_progress=stop)
    resumed = evaluate_suite("known", shards, tmp_path / "out", "muse", QUICK, open_answerer=known)
    asked = [line.split()[1] for line in log.read_text().splitlines()]
    assert asked == ["case/000#0", "case/002#0", "case/004#0"]
    whole = evaluate_suite("known", shards, tmp_path / "whole", "muse", QUICK, open_answerer=KnownAnswers(0.5))
    assert resumed.metrics == whole.metrics
    assert resumed.intervals == whole.intervals
    with pytest.raises(ConfigError, match="with another suite; choose another --out"):
        _run(shards, tmp_path / "out", "shapes", 0.5)


@pytest.mark.drill
def test_a_killed_actor_changes_nothing_and_no_sample_comes_twice(
    ray_cluster: str, shards: str, tmp_path: Path
) -> None:
    import evaluate_case
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(evaluate_case)  # the actors have no path to the tests
    (tmp_path / "die").touch()
    options = EvaluationOptions(with_report=False, batch_size=1, actors=2, actor_cpus=0.5)
    known = KnownAnswers(0.5, tmp_path / "log")
    killed = evaluate_suite("known", shards, tmp_path / "ray", "reasonseg", options, open_answerer=known)
    assert not (tmp_path / "die").exists()
    alone = _run(
        shards, tmp_path / "alone", "reasonseg", 0.5, EvaluationOptions(with_report=False, batch_size=1, actors=0)
    )
    assert killed.metrics == alone.metrics
    assert killed.breakdowns == alone.breakdowns
    tables = [pq.read_table(tmp_path / name / "samples.parquet") for name in ("ray", "alone")]
    assert tables[0].equals(tables[1])
    assert len(set(tables[0]["sample_id"].to_pylist())) == 12


def test_what_cannot_be_evaluated_is_refused_with_its_reason(
    shards: str, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no suite 'birds'; wanted one of segmentation, muse"):
        _run(shards, tmp_path, "birds", 1.0)
    with pytest.raises(DataError, match=r"no row of .* the suite mrefcoco; make its shards with"):
        _run(demo_shards["segmentation"], tmp_path / "none", "mrefcoco", 1.0)
    assert not (tmp_path / "none").exists()  # the right command may go there


def test_two_evaluations_are_compared_question_by_question(shards: str, tmp_path: Path) -> None:
    _run(shards, tmp_path / "a", "muse", 0.5)
    _run(shards, tmp_path / "b", "muse", 1.0)
    found = compare(tmp_path / "a", tmp_path / "b", page=tmp_path / "compare.html", num_changed=2)
    giou = found.differences[0]
    assert (giou.name, giou.first, giou.second) == ("giou", 0.5, 1.0)
    assert (giou.low, giou.high, giou.share_better) == (0.5, 0.5, 1.0)
    assert [change[1:] for change in found.changed] == [(0.5, 1.0)] * 2
    assert (found.questions, found.only_first, found.only_second) == (6, 0, 0)
    assert (tmp_path / "compare.html").read_text().count("data:image/jpeg") == 6
    short = EvaluationOptions(with_report=False, batch_size=2, limit=4)
    _run(shards, tmp_path / "c", "muse", 1.0, short)
    assert compare(tmp_path / "a", tmp_path / "c").only_first == 2
    _run(shards, tmp_path / "d", "shapes", 1.0)
    with pytest.raises(ConfigError, match="differ in suite"):
        compare(tmp_path / "a", tmp_path / "d")


def test_a_comparison_is_recorded_as_a_run(shards: str, tmp_path: Path) -> None:
    from pixellm.platform.tracking import connect_store, store_address

    settings = Settings.model_validate({"name": "compare", "tracking": {"root": str(tmp_path / "mlflow")}})
    for name, share in (("a", 0.5), ("b", 1.0)):
        _run(shards, tmp_path / name, "muse", share)
    compare(tmp_path / "a", tmp_path / "b", page=tmp_path / "compare.html", settings=settings)
    client = connect_store(store_address(settings.tracking))
    (run,) = client.search_runs(["1"])
    assert run.info.status == "FINISHED"
    assert (run.data.metrics["giou_first"], run.data.metrics["giou_second"], run.data.metrics["giou_low"]) == (
        0.5,
        1,
        0.5,
    )
    assert run.data.metrics["giou_change"] == 0.5
    assert run.data.tags["pixellm.compare.b.folder"] == str(tmp_path / "b")
    assert run.data.tags["pixellm.kind"] == "compare"
    found = {artifact.path for artifact in client.list_artifacts(run.info.run_id, "comparison")}
    assert found == {"comparison/comparison.txt", "comparison/compare.html"}


def test_the_results_are_recorded_as_a_run(shards: str, tmp_path: Path) -> None:
    from pixellm.platform.tracking import connect_store, store_address

    settings = Settings.model_validate({"name": "evaluate-muse", "tracking": {"root": str(tmp_path / "mlflow")}})
    result = evaluate_suite(
        "known", shards, tmp_path / "out", "muse", QUICK, settings=settings, open_answerer=KnownAnswers(0.5)
    )
    run = connect_store(store_address(settings.tracking)).get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["giou"] == 0.5
    assert run.data.tags["pixellm.evaluate.suite"] == "muse"
    assert "mask-only" in run.data.tags["pixellm.evaluate.judge"]
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["judge_note"].startswith("mask-only")


def test_a_question_about_nothing_is_right_only_without_a_mask(shards: str) -> None:
    # gRefCOCO counts a rightly empty answer as IoU 1 without pixels, an invented mask as IoU 0 with its pixels
    asked = next(iter(questions_of(open_shards(shards).read_row(0), 0, find_suite("grefcoco"), [0])))
    nothing = replace(asked, kind="none", phrases=(), masks=())
    quiet = sample_row(nothing, Answer("Nothing.", (), (), is_ordered=False), find_suite("grefcoco"))
    invented = Answer("There [1].", ("x",), (box_mask(0, 0),), is_ordered=False)
    loud = sample_row(nothing, invented, find_suite("grefcoco"))
    whole = Answer("Both [1].", ("x",), (box_mask(0, 0) | box_mask(0, 50),), is_ordered=False)
    figures = summarize([quiet, loud, sample_row(asked, whole, find_suite("grefcoco"))], "merged").figures()
    assert figures["no_target_accuracy"].value == 0.5
    assert figures["giou"].value == pytest.approx((1 + 0 + 1) / 3)
    assert figures["ciou"].value == pytest.approx(1600 / (800 + 1600))


def test_a_crowd_counts_neither_for_nor_against_and_predictions_keep_their_numbers(shards: str) -> None:
    asked = next(iter(questions_of(open_shards(shards).read_row(0), 0, find_suite("muse"), [0])))
    crowded = replace(asked, ignore=(rle_encode(box_mask(30, 50)),))
    masks = (box_mask(30, 50), box_mask(0, 50) | box_mask(30, 50, 5, 5), box_mask(0, 0))
    sample = sample_row(crowded, Answer("a", ("",) * 3, masks, is_ordered=False), find_suite("muse"))
    assert sample["ious"] == [1.0, 1.0]
    assert sample["pair_prediction"] == [2, 1]
    assert (sample["targets_returned"], len(sample["masks"])) == (2, 3)


def test_the_case_is_what_the_hand_values_assume() -> None:
    assert all(box_mask(*box).sum() == 800 for box in BOXES)
