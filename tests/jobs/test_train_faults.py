"""Faults with real processes killed: a driver, a worker, a node; each run ends with an undisturbed one's curve."""

from pathlib import Path

import pytest
from micro_run import micro_settings

from benchmarks import resume_drills as drills

STEPS, EVERY = 14, 3


@pytest.fixture(scope="module")
def undisturbed(
    process_group: None, demo_shards: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> dict[int, dict[int, float]]:
    """ZeRO stage → the losses of a run that nothing happens to, in one process: two micro-batches for two workers."""
    curves = {}
    for stage in (0, 2):
        folder = tmp_path_factory.mktemp(f"undisturbed-{stage}")
        tree = {"steps": STEPS, "grad_accumulation": 2, "checkpoint_every": STEPS, "zero_stage": stage}
        curves[stage] = drills.run_alone(micro_settings(demo_shards, folder, **tree), folder / "run").curve
    return curves


@pytest.mark.drill
def test_a_killed_driver_is_followed_by_one_that_goes_on_and_a_killed_worker_costs_at_most_one_interval(
    ray_cluster: str, demo_shards: dict[str, str], tmp_path: Path, undisturbed: dict[int, dict[int, float]]
) -> None:
    settings = micro_settings(demo_shards, tmp_path, steps=STEPS, num_workers=2, zero_stage=0, checkpoint_every=EVERY)
    outcome, recover_s, repeated = drills.driver_killed(
        settings, tmp_path / "run", ray_cluster, after_step=EVERY + 1, then=drills.killing_a_worker(2 * EVERY + 1)
    )
    assert outcome.result.step == STEPS
    assert outcome.result.resumed_from is not None
    assert repeated <= EVERY
    assert 0 < recover_s < drills.DEADLINE_S
    assert len(outcome.recover_s) == 1
    assert outcome.steps_repeated <= EVERY
    assert any("a worker was lost after step" in note for note in outcome.notes)
    assert any(note.startswith("recovered in ") for note in outcome.notes)
    assert outcome.curve == pytest.approx({step: undisturbed[0][step] for step in outcome.curve}, abs=1e-5)


@pytest.mark.drill
def test_a_lost_node_leaves_a_smaller_group_and_a_notice_in_time_leaves_a_checkpoint(
    demo_shards: dict[str, str], tmp_path: Path, undisturbed: dict[int, dict[int, float]]
) -> None:
    settings = micro_settings(
        demo_shards, tmp_path, steps=STEPS, num_workers=[1, 2], worker_cpus=2.0, checkpoint_every=EVERY, max_failures=5
    )
    lost, drained = drills.in_a_process_of_its_own(settings, tmp_path / "run", after_step=EVERY + 1, drain=True)
    assert lost.sizes == [2, 1]
    assert lost.steps_repeated <= EVERY
    assert any("with 1 workers instead of 2" in note for note in lost.notes)
    assert lost.curve == pytest.approx(undisturbed[2], abs=1e-5)

    assert drained.sizes == [2]
    assert drained.result.interrupted
    assert any("is about to be taken away" in note for note in drained.notes)
    assert drills.steps_on_disk(tmp_path / "run" / "drained") == [drained.result.step]
