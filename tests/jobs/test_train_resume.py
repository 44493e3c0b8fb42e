"""A whole worker in this process, without Ray: genuine samples, a very small model, DeepSpeed."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from micro_run import micro_settings
from safetensors.torch import load_file

from pixellm.errors import CheckpointError, ConfigError
from pixellm.jobs.train.build import build_model, build_processor, trained_parts
from pixellm.jobs.train.entry import WorkerSpec
from pixellm.jobs.train.events import CheckpointEvent, StartEvent, StepRecord, WorkerResult
from pixellm.jobs.train.worker import run_worker
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.processing import PixelLMProcessor
from pixellm.platform.data.compose import ComposeLimits, QuestionSource
from pixellm.platform.settings import Settings, TrainSettings


class RecordingLine:
    """The worker's end of the channel, kept in this process; wants a stop after some steps."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Any] = []
        self._stop_after = stop_after

    @property
    def steps(self) -> list[StepRecord]:
        return [event for event in self.events if isinstance(event, StepRecord)]

    def send(self, event: Any) -> None:
        self.events.append(event)

    def is_stop_wanted(self) -> bool:
        return self._stop_after is not None and len(self.steps) + 1 >= self._stop_after

    def is_checkpoint_wanted(self) -> bool:
        return False

    def curve(self) -> dict[int, tuple[float, dict[str, float], float]]:
        return {record.step: (record.loss, record.losses, record.grad_norm) for record in self.steps}


def worker_spec(settings: Settings, run_dir: Path) -> WorkerSpec:
    limits = ComposeLimits(settings.data.max_targets, settings.data.max_questions, settings.data.min_target_share)
    sources = tuple(QuestionSource.open(source.uri, source.group, limits) for source in settings.data.sources)
    return WorkerSpec(settings, str(run_dir), sources)


def _run(settings: Settings, run_dir: Path, stop_after: int | None = None) -> tuple[WorkerResult, RecordingLine]:
    line = RecordingLine(stop_after)
    return run_worker(worker_spec(settings, run_dir), line), line  # type: ignore[arg-type]


def test_a_run_stopped_and_resumed_has_the_loss_curve_of_the_undisturbed_one_bit_for_bit(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    settings = micro_settings(demo_shards, tmp_path, grad_accumulation=2)
    whole, undisturbed = _run(settings, tmp_path / "whole")
    assert (whole.step, whole.interrupted, whole.resumed_from) == (6, False, None)
    assert all(math.isfinite(record.loss) for record in undisturbed.steps)

    first, before = _run(settings, tmp_path / "parts", stop_after=3)
    assert (first.step, first.interrupted) == (3, True)
    assert not (tmp_path / "parts" / "model").exists()
    second, after = _run(settings, tmp_path / "parts")
    assert (second.step, second.interrupted, second.resumed_from) == (6, False, 3)
    assert before.curve() | after.curve() == undisturbed.curve()

    one = load_file(tmp_path / "whole" / "model" / "model.safetensors")
    other = load_file(tmp_path / "parts" / "model" / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_damaged_checkpoint_is_named_and_the_run_goes_on_from_the_one_before(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    settings = micro_settings(demo_shards, tmp_path, zero_stage=0)
    _, undisturbed = _run(settings, tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step-000006" / "weights.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    result, line = _run(settings, tmp_path / "run")
    assert result.resumed_from == 4
    start = next(event for event in line.events if isinstance(event, StartEvent))
    assert "step-000006 is damaged: weights.safetensors" in start.problems[0]
    assert line.curve() == {step: values for step, values in undisturbed.curve().items() if step > 4}


def test_checkpoints_fall_on_the_interval_and_only_the_last_are_kept(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    settings = micro_settings(demo_shards, tmp_path, keep_last=2, zero_stage=0)
    _, line = _run(settings, tmp_path / "run")
    assert [event.step for event in line.events if isinstance(event, CheckpointEvent)] == [2, 4, 6]
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000004", "step-000006"]
    meta = json.loads((tmp_path / "run" / "checkpoints" / "step-000006" / "meta.json").read_text())
    assert (meta["step"], meta["position"], meta["world_size"]) == (6, 6 * settings.train.global_batch_size, 1)
    assert meta["config"]["train"]["lr"] == settings.train.lr


def test_a_lora_run_leaves_frozen_weights_untouched_and_saves_a_model_with_the_adapter_merged(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    lora = {"enabled": True, "r": 4, "dropout": 0.1}
    settings = micro_settings(
        demo_shards, tmp_path, lora=lora, train_vision=False, train_language=False, lr=1e-2, steps=4
    )
    drawn = {name.replace(".base_layer.", "."): value for name, value in build_model(settings).state_dict().items()}
    _run(settings, tmp_path / "run")
    model = PixelLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "model")
    PixelLMProcessor.from_pretrained(tmp_path / "run" / "model").check_matches(model.config)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, drawn[name])}
    parts = {model.part_of(name) for name in changed}
    assert not any(".lora_" in name for name in model.state_dict())
    assert parts == {"projectors", "embeddings", "codebook", "decoder", "neck", "language"}
    merged = {name for name in changed if model.part_of(name) == "language"}
    assert merged == {
        f"language_model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in range(2) for kind in ("q", "v")
    }

    checkpoint = load_file(tmp_path / "run" / "checkpoints" / "step-000004" / "weights.safetensors")
    stem = "language_model.layers.0.self_attn.q_proj"
    update = checkpoint[f"{stem}.lora_B.default.weight"] @ checkpoint[f"{stem}.lora_A.default.weight"]
    expected = drawn[f"{stem}.weight"] + 16 / 4 * update
    assert torch.allclose(model.state_dict()[f"{stem}.weight"], expected, atol=1e-6)


def test_a_lora_run_with_dropout_resumes_bit_for_bit(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    lora = {"enabled": True, "r": 4, "dropout": 0.3}
    settings = micro_settings(demo_shards, tmp_path, lora=lora, train_vision=False, train_language=False, steps=4)
    _, undisturbed = _run(settings, tmp_path / "whole")
    _, before = _run(settings, tmp_path / "parts", stop_after=1)
    _, after = _run(settings, tmp_path / "parts")
    assert before.curve() | after.curve() == undisturbed.curve()


def test_checkpoints_of_a_run_from_a_model_folder_leave_its_frozen_weights_out(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    settings = micro_settings(demo_shards, tmp_path, steps=2, train_vision=False, zero_stage=3, precision="bf16")
    folder = tmp_path / "start"
    build_model(settings).save_pretrained(folder)
    build_processor(settings).save_pretrained(folder)
    model = settings.model.model_copy(update={"init_from": str(folder), "overrides": {}})
    settings = settings.model_copy(update={"model": model})
    _run(settings, tmp_path / "run")
    saved = load_file(tmp_path / "run" / "checkpoints" / "step-000002" / "weights.safetensors")
    assert not any(name.startswith("vision_tower") for name in saved)
    result, _ = _run(settings, tmp_path / "run")
    assert result.resumed_from == 2
    finished = PixelLMForConditionalGeneration.from_pretrained(tmp_path / "run" / "model").state_dict()
    start = load_file(folder / "model.safetensors")
    frozen = [name for name in start if name.startswith("vision_tower")]
    assert frozen
    assert all(torch.equal(finished[name].float(), start[name].bfloat16().float()) for name in frozen)


def test_a_checkpoint_of_another_recipe_is_refused(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    settings = micro_settings(demo_shards, tmp_path, steps=2, zero_stage=0)
    _run(settings, tmp_path / "run")
    lora = settings.train.model_copy(update={"lora": settings.train.lora.model_copy(update={"enabled": True})})
    other = settings.model_copy(update={"train": lora.model_copy(update={"train_language": False})})
    with pytest.raises(CheckpointError, match="another model or another choice of trained parts"):
        _run(other, tmp_path / "run")


def test_recipes_name_the_parts_that_train() -> None:
    base = {"projectors", "embeddings", "codebook", "decoder", "neck"}
    assert trained_parts(TrainSettings()) == base
    scratch = TrainSettings(train_language=True, train_vision=True)
    assert trained_parts(scratch) == base | {"language", "vision"}
    lora = TrainSettings.model_validate({"lora": {"enabled": True}})
    assert trained_parts(lora) == base | {"lora"}
    with pytest.raises(ConfigError, match="exclude each other"):
        trained_parts(replace_lora(scratch))


def replace_lora(train: TrainSettings) -> TrainSettings:
    return train.model_copy(update={"lora": train.lora.model_copy(update={"enabled": True})})
