"""DeepSpeed, really initialised: its steps are those of a plain loop, and its state moves between group sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy import Toy, ToyOutput, plain_loop, toy_batch

from pixellm.errors import CheckpointError, ConfigError
from pixellm.jobs.train.checkpoints import CheckpointFolder
from pixellm.jobs.train.deepspeed_engine import TrainEngine, exact_gradient_norm, seed_micro_batch
from pixellm.jobs.train.optimizer_state import gather_weights
from pixellm.jobs.train.snapshot import load_optimizer_state, load_weights, save_snapshot
from pixellm.platform.settings import TrainSettings

HERE = Path(__file__).parent


def _settings(stage: int, precision: str = "fp32") -> TrainSettings:
    return TrainSettings(precision=precision, zero_stage=stage, num_workers=1, lr=1e-2)  # type: ignore[arg-type]


def _train(engine: TrainEngine, first: int, last: int, places: int = 3) -> list[float]:
    return [
        engine.train_step([toy_batch(step, place) for place in range(places)], step=step, lr=1e-2).loss
        for step in range(first, last)
    ]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_takes_the_steps_of_a_plain_adamw_loop(process_group: None, stage: int) -> None:
    plain = Toy()
    expected = plain_loop(plain, 4, 3, 1e-2)
    engine = TrainEngine.build(Toy(always_runs_head=stage == 3), _settings(stage))
    assert _train(engine, 0, 4) == pytest.approx(expected, abs=1e-6)
    weights = gather_weights(engine, only_trainable=False)
    for name, parameter in plain.named_parameters():
        assert torch.allclose(weights[name], parameter, atol=1e-6), name


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (2, "bf16"), (3, "fp32")])
def test_a_restored_engine_goes_on_bit_for_bit(process_group: None, tmp_path: Path, stage: int, precision: str) -> None:
    folder = CheckpointFolder(tmp_path)
    engine = TrainEngine.build(Toy(always_runs_head=True), _settings(stage, precision))
    _train(engine, 0, 2)
    save_snapshot(engine, folder, step=2, position=6, only_trainable=False, config={})
    undisturbed = _train(engine, 2, 5)

    checkpoint, problems = folder.latest_valid()
    assert checkpoint is not None
    assert not problems
    model = Toy(always_runs_head=True)
    torch.nn.init.normal_(model.body.weight)  # whatever it starts from is overwritten
    load_weights(model, checkpoint, only_trainable=False)
    restored = TrainEngine.build(model, _settings(stage, precision))
    load_optimizer_state(restored, checkpoint)
    assert _train(restored, 2, 5) == undisturbed


def test_a_checkpoint_of_one_zero_stage_goes_on_in_another(process_group: None, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    engine = TrainEngine.build(Toy(always_runs_head=True), _settings(2))
    _train(engine, 0, 2)
    save_snapshot(engine, folder, step=2, position=6, only_trainable=False, config={})
    undisturbed = _train(engine, 2, 4)
    checkpoint, _ = folder.latest_valid()
    assert checkpoint is not None
    for stage in (0, 3):
        model = Toy(always_runs_head=True)
        load_weights(model, checkpoint, only_trainable=False)
        other = TrainEngine.build(model, _settings(stage))
        load_optimizer_state(other, checkpoint)
        assert _train(other, 2, 4) == pytest.approx(undisturbed, abs=1e-6)


def test_an_elastic_run_takes_the_steps_of_a_fixed_one_bit_for_bit_in_a_group_of_one(process_group: None) -> None:
    elastic = _settings(2).model_copy(update={"num_workers": (1, 2), "clip_norm": 0.1})
    fixed = elastic.model_copy(update={"num_workers": 1})
    curves = [_train(TrainEngine.build(Toy(), train), 0, 5) for train in (elastic, fixed)]
    assert curves[0] == curves[1]
    parts = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert float(exact_gradient_norm(parts, None)) == 5.0
    assert float(exact_gradient_norm([*parts, torch.tensor([float("nan")])], None)) == -1.0
    assert float(exact_gradient_norm([], None)) == 0.0


def test_an_offloaded_optimiser_takes_the_same_steps_and_goes_on_bit_for_bit(
    process_group: None, tmp_path: Path
) -> None:
    train = _settings(2).model_copy(update={"offload_optimizer": True})
    expected = plain_loop(Toy(always_runs_head=True), 4, 3, 1e-2)
    engine = TrainEngine.build(Toy(always_runs_head=True), train)
    assert _train(engine, 0, 2) == pytest.approx(expected[:2], abs=1e-6)
    save_snapshot(engine, CheckpointFolder(tmp_path), step=2, position=6, only_trainable=False, config={})
    undisturbed = _train(engine, 2, 4)
    assert undisturbed == pytest.approx(expected[2:], abs=1e-6)
    checkpoint, _ = CheckpointFolder(tmp_path).latest_valid()
    assert checkpoint is not None
    model = Toy(always_runs_head=True)
    load_weights(model, checkpoint, only_trainable=False)
    restored = TrainEngine.build(model, train)
    load_optimizer_state(restored, checkpoint)
    assert _train(restored, 2, 4) == undisturbed


def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(process_group: None) -> None:
    for stage in (0, 2):
        engine = TrainEngine.build(Toy(), _settings(stage))
        _train(engine, 0, 1)
        before = {name: value.clone() for name, value in gather_weights(engine, only_trainable=False).items()}
        bad = toy_batch(1, 0) | {"pixel_values": torch.full((4, 7), float("inf"))}
        result = engine.train_step([bad], step=1, lr=1e-2)
        assert not result.is_applied
        after = gather_weights(engine, only_trainable=False)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert engine.train_step([toy_batch(2, 0)], step=2, lr=1e-2).is_applied


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_loss_that_is_not_finite_changes_nothing_even_where_its_gradient_is(process_group: None, stage: int) -> None:
    class Overflowing(Toy):
        def forward(self, pixel_values: torch.Tensor, use_head: bool) -> ToyOutput:
            output = super().forward(pixel_values, use_head)
            return ToyOutput(output.loss + (float("inf") if self.overflows else 0.0), output.losses)

    model = Overflowing(always_runs_head=True)
    model.overflows = False
    engine = TrainEngine.build(model, _settings(stage))
    _train(engine, 0, 1)
    before = gather_weights(engine, only_trainable=False)
    model.overflows = True
    assert not engine.train_step([toy_batch(1, 0)], step=1, lr=1e-2).is_applied
    after = gather_weights(engine, only_trainable=False)
    assert all(torch.equal(before[name], after[name]) for name in before)
    model.overflows = False
    assert engine.train_step([toy_batch(2, 0)], step=2, lr=1e-2).is_applied


def test_a_checkpoint_that_lacks_a_trained_parameter_is_refused_by_name(process_group: None, tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path)
    part = Toy(always_runs_head=True)
    part.extra_head.requires_grad_(False)
    engine = TrainEngine.build(part, _settings(2))
    _train(engine, 0, 1)
    save_snapshot(engine, folder, step=1, position=3, only_trainable=True, config={})
    checkpoint, _ = folder.latest_valid()
    assert checkpoint is not None
    whole = Toy()
    with pytest.raises(CheckpointError, match=r"extra_head.*--fresh"):
        load_weights(whole, checkpoint, only_trainable=True)
    with pytest.raises(CheckpointError, match=r"no master of extra_head.weight"):
        load_optimizer_state(TrainEngine.build(whole, _settings(2)), checkpoint)


def test_a_model_without_trainable_parameters_is_refused(process_group: None) -> None:
    with pytest.raises(ConfigError, match="trains no parameter"):
        TrainEngine.build(Toy().requires_grad_(False), _settings(2))


def test_the_random_state_depends_on_each_of_seed_step_and_place_in_the_global_batch() -> None:
    drawn = set()
    for numbers in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        seed_micro_batch(*numbers)
        drawn.add(float(torch.rand(())))
        seed_micro_batch(*numbers)
        assert float(torch.rand(())) in drawn
    assert len(drawn) == 4


def _group(tmp_path: Path, world: int, stage: int, mode: str) -> dict[int, float]:
    """Runs a group of processes to the end; returns rank 0's loss curve."""
    rendezvous = tmp_path / f"rendezvous-{world}-{stage}-{mode}"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    arguments = [str(stage), "fp32", mode, str(tmp_path / "checkpoints")]
    processes = [
        subprocess.Popen(
            [sys.executable, str(HERE / "two_ranks.py"), str(rendezvous), str(rank), str(world), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    outputs = [process.communicate(timeout=240) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs[0][1][-2000:]
    curve = json.loads(outputs[0][0].strip().splitlines()[-1])
    return {int(step): loss for step, loss in curve.items()}


def test_two_ranks_with_different_kinds_of_samples_train_as_one_process_and_hand_over_to_one(tmp_path: Path) -> None:
    plain = plain_loop(Toy(), 5, 4, 1e-2)
    two = _group(tmp_path, 2, 2, "save")
    assert [two[step] for step in range(5)] == pytest.approx(plain, abs=1e-6)
    one = _group(tmp_path, 1, 2, "resume")
    assert [one[step] for step in range(2, 5)] == pytest.approx(plain[2:], abs=1e-6)
