"""The dry run: its numbers against hand-made ones and a network that was really built; what cannot fit names a knob."""

import json
import time
from pathlib import Path

import pytest
from micro_run import micro_settings
from typer.testing import CliRunner

from pixellm.cli import app
from pixellm.errors import ConfigError
from pixellm.jobs.train.build import build_model
from pixellm.jobs.train.plan import GB, MemoryPlan, memory_at, plan_training
from pixellm.platform.settings import TrainSettings, load_settings


def test_the_7b_plan_on_eight_gpus_agrees_with_arithmetic_on_paper() -> None:
    started = time.monotonic()
    plan = plan_training(load_settings("pixellm-7b"))
    assert time.monotonic() - started < 60
    # LoRA of rank 8 on q and v of 32 layers of width 4096; two matrices each.
    assert plan.parts["lora"] == (32 * 2 * 2 * 8 * 4096, 0)
    # Embedding and head: 32000 pieces, 6 codebook tokens, im_start and im_end.
    assert plan.parts["embeddings"] == (2 * 32008 * 4096, 0)
    per_layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    assert plan.parts["language"] == (0, 32 * per_layer + 4096)
    trained = sum(trained for trained, _ in plan.parts.values())
    parameters = sum(sum(pair) for pair in plan.parts.values())
    assert plan.memory.zero_stage == 2
    assert plan.memory.weights == 2 * parameters
    assert plan.memory.optimizer == pytest.approx(12 * trained / 8)
    assert (plan.global_batch_size, plan.tokens) == (160, 5000 * 160 * 456)
    assert plan.stages[3].weights == pytest.approx(2 * parameters / 8)
    assert [stage.total for stage in plan.stages] == sorted((stage.total for stage in plan.stages), reverse=True)
    assert plan.hours is not None
    faster = plan_training(load_settings("pixellm-7b", ["--plan.mfu=0.7"]))
    assert faster.hours == pytest.approx(plan.hours / 2)


def test_a_plan_that_cannot_fit_names_the_knob_that_mends_it() -> None:
    with pytest.raises(ConfigError, match=r"does not fit: .* GB.*--train\.gradient_checkpointing=true brings it to"):
        plan_training(load_settings("pixellm-7b", ["--train.gradient_checkpointing=false", "--plan.device_gb=24"]))
    with pytest.raises(ConfigError, match=r"at ZeRO 2; --train\.zero_stage=3 brings it to"):
        plan_training(load_settings("pixellm-13b", ["--plan.device_gb=24"]))
    with pytest.raises(ConfigError, match=r"--train\.gradient_checkpointing=true .*zero_stage=3 brings it to"):
        plan_training(load_settings("pixellm-13b", ["--train.gradient_checkpointing=false", "--plan.device_gb=16"]))
    with pytest.raises(ConfigError, match="no knob of the recipe is enough: more workers"):
        plan_training(load_settings("pixellm-7b", ["--plan.device_gb=2"]))


def test_the_planned_parameters_are_those_of_the_network_that_trains(tmp_path: Path) -> None:
    lora = {"enabled": True, "r": 4}
    settings = micro_settings({}, tmp_path, lora=lora, train_vision=False, train_language=False)
    plan, model = plan_training(settings), build_model(settings)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(one for one, _ in plan.parts.values()) == trained
    assert sum(sum(pair) for pair in plan.parts.values()) == sum(p.numel() for p in model.parameters())
    assert plan.hours is None  # nobody knows a CPU's peak
    assert "expected time     unknown (set plan.peak_tflops)" in plan.to_text()


def test_memory_by_stage_counts_what_the_engine_keeps() -> None:
    def at(stage: int, **values: object) -> MemoryPlan:
        train = TrainSettings.model_validate({"num_workers": 4, "grad_accumulation": 1, **values})
        return memory_at(stage, train, 100, 1000, 0.0)

    assert (at(0).weights, at(0).gradients, at(0).optimizer) == (2000, 200, 1200)
    assert (at(2).gradients, at(2).optimizer) == (200 + 100, 300)
    assert at(2, grad_accumulation=4).gradients == 200 + 400 + 100
    assert at(3).weights == 500
    assert at(0, precision="fp32").optimizer == 800  # parameters are their own masters
    assert at(1, ema_decay=0.99).optimizer == 400
    offloaded = at(2, offload_optimizer=True)
    assert (offloaded.optimizer, offloaded.offloaded) == (0, 300)


def test_the_command_prints_the_plan_and_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["train", "--config", "recipes/tiny.yaml", "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)
    assert shown["global_batch_size"] == 8
    assert shown["stages"][2]["total"] < shown["device_gb"] * GB
    assert not list(tmp_path.iterdir())
