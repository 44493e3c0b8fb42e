"""From pictures to an evaluated model by way of generated questions, made in the actors of a Ray Data pipeline."""

import sys
from pathlib import Path

import pytest
from micro_run import micro_settings

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))

from benchmarks.muse_checker import adds_up, fingerprint  # noqa: E402
from benchmarks.muse_server import MuseServer  # noqa: E402
from pixellm.jobs.evaluate.job import EvaluationOptions, evaluate_suite  # noqa: E402
from pixellm.jobs.muse.asker import AskPlan  # noqa: E402
from pixellm.jobs.muse.asking import AskOptions  # noqa: E402
from pixellm.jobs.muse.run import generate  # noqa: E402
from pixellm.jobs.muse.splits import SplitShares  # noqa: E402
from pixellm.jobs.train.run import train  # noqa: E402
from pixellm.platform.data.shards import open_shards, write_shards  # noqa: E402
from pixellm.platform.data.sources.shapes import ShapesSource  # noqa: E402
from pixellm.platform.llm_service import ServiceSettings  # noqa: E402


@pytest.mark.drill
def test_actors_make_the_questions_that_one_process_makes_and_a_model_is_trained_and_evaluated_on_them(
    tmp_path: Path, ray_cluster: str
) -> None:
    shapes = ShapesSource(samples=30, seed=3)
    write_shards(map(shapes.row_at, range(30)), tmp_path / "shapes", name="shapes")
    with MuseServer(faults={"busy": 0.1, "error": 0.1, "markers": 0.2}) as server:
        service = ServiceSettings(server.url, back_off_s=0.02)
        plan = AskPlan(open_shards(tmp_path / "shapes"), AskOptions("scripted"), service, concurrency=8)
        shares = SplitShares(val=0.2, test=0.1)
        report = generate(plan, str(tmp_path / "muse"), shares=shares, actors=1)
        answers = sum(server.answered.values())
        alone = generate(plan, str(tmp_path / "alone"), shares=shares, actors=0)
        assert sum(server.answered.values()) == 2 * answers
    assert fingerprint(tmp_path / "muse") == fingerprint(tmp_path / "alone")
    assert (report.pairs, report.splits, report.cost) == (alone.pairs, alone.splits, alone.cost)
    assert adds_up(report.to_json_dict())
    assert report.pairs["kept"] >= 30
    settings = micro_settings({"muse": str(tmp_path / "muse" / "train")}, tmp_path, steps=2, checkpoint_every=2)
    wider = settings.data.model_copy(update={"max_targets": 8})
    result = train(settings.model_copy(update={"data": wider}), progress=False)
    assert result.steps == 2
    assert result.model_dir is not None
    options = EvaluationOptions(limit=3)
    outcome = evaluate_suite(result.model_dir, str(tmp_path / "muse" / "val"), tmp_path / "evaluation", "muse", options)
    assert (outcome.questions, outcome.run_id) == (3, None)
    assert 0.0 <= outcome.metrics["giou"] <= 1.0
