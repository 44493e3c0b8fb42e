"""From pictures to a trained and evaluated model by way of generated questions, on shapes that a script describes."""

import sys
from pathlib import Path

from micro_run import micro_settings

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.append(str(REPOSITORY))

from benchmarks.muse_checker import adds_up  # noqa: E402
from benchmarks.muse_server import MuseServer  # noqa: E402
from pixellm.jobs.evaluate.run import evaluate  # noqa: E402
from pixellm.jobs.muse.asker import AskPlan  # noqa: E402
from pixellm.jobs.muse.asking import AskOptions  # noqa: E402
from pixellm.jobs.muse.run import generate  # noqa: E402
from pixellm.jobs.muse.splits import SplitShares  # noqa: E402
from pixellm.jobs.train.run import train  # noqa: E402
from pixellm.platform.data.shards import open_shards, write_shards  # noqa: E402
from pixellm.platform.data.sources.shapes import ShapesSource  # noqa: E402
from pixellm.platform.llm_service import ServiceSettings  # noqa: E402


def test_generated_questions_about_shapes_train_a_model_that_is_evaluated_on_the_held_out_split(
    tmp_path: Path, ray_cluster: str
) -> None:
    shapes = ShapesSource(samples=30, seed=3)
    write_shards(map(shapes.row_at, range(30)), tmp_path / "shapes", name="shapes")
    with MuseServer() as server:
        plan = AskPlan(
            open_shards(tmp_path / "shapes"), AskOptions("scripted"), ServiceSettings(server.url), concurrency=8
        )
        report = generate(plan, str(tmp_path / "muse"), shares=SplitShares(val=0.2, test=0.1), actors=0)
    assert adds_up(report.to_json_dict())
    assert report.pairs["kept"] >= 30
    settings = micro_settings({"muse": str(tmp_path / "muse" / "train")}, tmp_path, steps=2, checkpoint_every=2)
    wider = settings.data.model_copy(update={"max_targets": 8})
    result = train(settings.model_copy(update={"data": wider}), progress=False)
    assert result.steps == 2
    assert result.model_dir is not None
    outcome = evaluate(result.model_dir, str(tmp_path / "muse" / "val"), tmp_path / "evaluation", suite="muse", limit=3)
    assert outcome.metrics["num_questions"] == 3
    assert 0.0 <= outcome.metrics["giou"] <= 1.0
