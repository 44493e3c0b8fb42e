"""What happens beside the steps, in one process without Ray: validation, best checkpoints, averages, stores, disks."""

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from micro_run import micro_settings
from safetensors.torch import load_file
from test_train_resume import RecordingLine, worker_spec

from benchmarks import resume_drills as drills
from pixellm.errors import ConfigError
from pixellm.jobs.train.build import build_model, build_processor
from pixellm.jobs.train.checkpoints import CheckpointFolder, steps_to_remove
from pixellm.jobs.train.events import StartEvent, UploadEvent, ValidationEvent, WorkerResult
from pixellm.jobs.train.run import open_sources, resolve_source_uris, train
from pixellm.jobs.train.run_folder import RunFolder, RunState, identity_of
from pixellm.jobs.train.upload import Uploader
from pixellm.jobs.train.validation import Plateau, share_of_rank
from pixellm.jobs.train.worker import run_worker
from pixellm.platform.settings import Settings, ValidationSettings


def _run(settings: Settings, run_dir: Path, line: RecordingLine | None = None) -> tuple[WorkerResult, RecordingLine]:
    line = line or RecordingLine()
    return run_worker(worker_spec(settings, run_dir), line), line  # type: ignore[arg-type]


def _validations(*lines: RecordingLine) -> list[tuple[int, dict[str, float], bool]]:
    events = [event for line in lines for event in line.events if isinstance(event, ValidationEvent)]
    return [(event.step, event.metrics, event.is_best) for event in events]


@pytest.mark.parametrize("stage", [0, 3])
def test_validation_averages_and_rates_by_part_resume_exactly(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path, stage: int
) -> None:
    validation = {"every": 2, "uri": demo_shards["muse"], "limit": 3, "keep_best": 1, "num_pictures": 1}
    settings = micro_settings(
        demo_shards,
        tmp_path,
        steps=4,
        zero_stage=stage,
        ema_decay=0.9,
        lr_scale={"decoder": 3.0, "embeddings": 0.5},
        validation=validation,
        keep_last=1,
    )
    _, undisturbed = _run(settings, tmp_path / "whole")
    _, before = _run(settings, tmp_path / "parts", RecordingLine(stop_after=3))
    _, after = _run(settings, tmp_path / "parts")
    assert before.curve() | after.curve() == undisturbed.curve()
    assert _validations(before, after) == _validations(undisturbed)
    assert [step for step, _, _ in _validations(undisturbed)] == [2, 4]
    metrics = _validations(undisturbed)[0][1]
    assert metrics["num_questions"] == 3
    assert 0 <= metrics["giou"] <= 1
    assert metrics["text_loss"] > 0
    assert len(list((tmp_path / "whole" / "validation" / "step-000002").glob("*.png"))) == 1

    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    # The finished model is the average, which the last weights have left behind.
    last = load_file(tmp_path / "whole" / "checkpoints" / "step-000004" / "weights.safetensors")
    assert not torch.equal(one["lm_head.weight"], last["lm_head.weight"])
    assert (one["lm_head.weight"] - last["lm_head.weight"]).abs().max() < 0.05


def test_the_average_and_the_parts_rates_are_what_ten_lines_of_torch_make_of_them(process_group: None) -> None:
    from toy import Toy, toy_batch

    from pixellm.jobs.train.average import WeightAverage
    from pixellm.jobs.train.deepspeed_engine import TrainEngine
    from pixellm.jobs.train.optimizer_state import AVERAGE
    from pixellm.platform.settings import TrainSettings

    class PartedToy(Toy):
        @staticmethod
        def part_of(name: str) -> str:
            return "decoder" if name.startswith("head") else "neck"

    plain = PartedToy(always_runs_head=True)
    groups = [
        {"params": [p for n, p in plain.named_parameters() if plain.part_of(n) == part], "lr": lr}
        for part, lr in (("decoder", 2e-2), ("neck", 1e-2))
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    expected = {name: value.detach().clone() for name, value in plain.named_parameters()}
    train = TrainSettings(precision="fp32", zero_stage=2, num_workers=1, lr_scale={"decoder": 2.0})
    engine = TrainEngine.build(PartedToy(always_runs_head=True), train)
    engine.average = WeightAverage(engine, 0.9)
    for step in range(3):
        engine.train_step([toy_batch(step, 0)], step=step, lr=1e-2)
        optimizer.zero_grad()
        plain(**toy_batch(step, 0)).loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        keep = min(0.9, (2 + step) / (11 + step))
        expected = {n: keep * expected[n] + (1 - keep) * p.detach() for n, p in plain.named_parameters()}
    for stretch in engine.average.stretches():
        assert stretch.kind == AVERAGE
        flat = expected[stretch.parameter].view(-1)[stretch.start : stretch.start + stretch.values.numel()]
        assert torch.allclose(stretch.values, flat, atol=1e-6), stretch.parameter
    with pytest.raises(ConfigError, match="lr_scale names 'lora', which this recipe does not train"):
        TrainEngine.build(PartedToy(), train.model_copy(update={"lr_scale": {"lora": 2.0}}))


def test_training_ends_on_a_plateau_and_the_best_checkpoint_becomes_the_model(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    validation = {"every": 2, "uri": demo_shards["muse"], "limit": 2, "keep_best": 1, "num_pictures": 0}
    validation |= {"patience": 2, "min_improvement": 1.0, "metric": "giou", "finish_with_best": True}
    settings = micro_settings(demo_shards, tmp_path, steps=40, zero_stage=0, validation=validation, keep_last=1)
    result, line = _run(settings, tmp_path / "run")
    assert (result.step, result.interrupted, result.ended_early) == (6, False, True)
    assert [is_best for _, _, is_best in _validations(line)] == [True, False, False]
    folder = CheckpointFolder(tmp_path / "run" / "checkpoints")
    best = folder.best_step("giou")
    assert best is not None
    assert set(folder.steps()) == {best, 6}
    model = load_file(tmp_path / "run" / "model" / "model.safetensors")
    kept = load_file(folder.path_of(best) / "weights.safetensors")
    assert all(torch.equal(model[name], kept[name]) for name in kept)


def test_a_plateau_counts_validations_since_the_best_one() -> None:
    chosen = ValidationSettings(every=1, patience=2, min_improvement=0.1)
    state = Plateau()
    for step, value, stale in [(1, 0.2, 0), (2, 0.25, 1), (3, 0.31, 0), (4, float("nan"), 1), (5, 0.3, 2)]:
        state = state.after(step, {"giou": value}, chosen)
        assert state.stale == stale, step
    assert (state.best_step, state.is_over(chosen)) == (3, True)
    losses = ValidationSettings(every=1, metric="text_loss")
    falling = Plateau().after(1, {"text_loss": 2.0}, losses).after(2, {"text_loss": 1.0}, losses)
    assert (falling.best_step, falling.is_over(losses)) == (2, False)


def test_the_last_and_the_best_checkpoints_stay() -> None:
    scores = {10: 0.1, 20: 0.9, 30: None, 40: 0.5, 50: 0.9, 60: None, 70: 0.2}
    assert steps_to_remove(scores, 2, 0) == [10, 20, 30, 40, 50]
    assert steps_to_remove(scores, 2, 1) == [10, 20, 30, 40]
    assert steps_to_remove(scores, 1, 3) == [10, 30, 60]
    assert steps_to_remove({}, 1, 1) == []


def test_ranks_ask_every_question_once_in_equally_many_batches() -> None:
    questions: list[Any] = [f"q{number}" for number in range(7)]
    for world_size in (1, 2, 3, 8):
        shares = [share_of_rank(questions, 2, rank, world_size) for rank in range(world_size)]
        assert len({len(share) for share in shares}) == 1
        asked = [q for share in shares for batch, count in share for q in batch[:count]]
        assert sorted(asked) == questions
        assert all(batch for share in shares for batch, _ in share)


def test_a_store_that_fails_three_times_gets_every_checkpoint_and_a_new_machine_goes_on_from_it(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pixellm.jobs.train.upload.FIRST_PAUSE_S", 0.01)
    settings = micro_settings(demo_shards, tmp_path, steps=4, zero_stage=0, keep_last=1)
    _, uploads = drills.store_fails(settings, tmp_path / "one", failures=3)
    assert uploads[0].attempts == 4
    assert all(event.problem is None for event in uploads)
    store = tmp_path / "one" / "store" / "micro"
    assert [path.name for path in store.iterdir()] == ["step-000004"]
    assert CheckpointFolder(tmp_path / "one" / "checkpoints").steps() == [4]

    # A damaged newer copy, and one whose upload was cut, are passed over.
    for step in (6, 8):
        shutil.copytree(store / "step-000004", store / f"step-{step:06d}")
    (store / "step-000006" / "weights.safetensors").write_bytes(b"half")
    (store / "step-000008" / "meta.json").unlink()
    longer = micro_settings(demo_shards, tmp_path, steps=5, zero_stage=0, checkpoint_uri=f"flaky://{store.parent}")
    result, second = _run(longer, tmp_path / "two")
    assert (result.resumed_from, result.step) == (4, 5)
    start = next(event for event in second.events if isinstance(event, StartEvent))
    assert "step-000006" in start.problems[0]


def test_a_store_that_stays_away_is_named_and_nothing_else_happens(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    (tmp_path / "blocked").write_text("a file where a folder should be")
    events: list[UploadEvent] = []
    folder = CheckpointFolder(tmp_path / "checkpoints")
    uploader = Uploader(str(tmp_path / "blocked" / "run"), folder, events.append, pause_s=0.001)
    uploader.submit(2, frozenset({2}))
    assert uploader.busy <= {2}
    uploader.close()
    assert (events[0].step, events[0].attempts) == (2, 6)
    assert events[0].problem
    assert not uploader.busy


def test_a_disk_that_refuses_a_checkpoint_costs_that_checkpoint_only(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    settings = micro_settings(demo_shards, tmp_path, steps=4, zero_stage=0)
    undisturbed = drills.run_alone(settings, tmp_path / "whole")
    outcome, _ = drills.disk_full(settings, tmp_path / "run", at_step=2)
    assert outcome.curve == undisturbed.curve
    assert drills.steps_on_disk(tmp_path / "run") == [4]


def test_recomputing_activations_changes_no_number_and_frozen_parts_keep_their_bytes(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    lora = {"enabled": True, "r": 4, "dropout": 0.2}
    common: dict[str, Any] = {"lora": lora, "train_vision": False, "train_language": False, "steps": 3, "lr": 1e-2}
    settings = micro_settings(demo_shards, tmp_path, **common)
    _, plain = _run(settings, tmp_path / "plain")
    _, saving = _run(micro_settings(demo_shards, tmp_path, gradient_checkpointing=True, **common), tmp_path / "saving")
    for step, (loss, _, norm) in plain.curve().items():
        assert (loss, norm) == pytest.approx((saving.curve()[step][0], saving.curve()[step][2]), abs=1e-5)
    drawn = build_model(settings)
    saved = load_file(tmp_path / "plain" / "checkpoints" / "step-000003" / "weights.safetensors")
    frozen = [name for name, parameter in drawn.named_parameters() if not parameter.requires_grad]
    assert {drawn.part_of(name) for name in frozen} == {"vision", "language", "decoder"}
    parameters = dict(drawn.named_parameters())
    for name in frozen:
        assert saved[name].numpy().tobytes() == parameters[name].detach().numpy().tobytes(), name
    assert all(not torch.equal(saved[n], p) for n, p in parameters.items() if p.requires_grad and "lm_head" in n)


def test_a_checkpoint_says_what_it_is_in_words(
    process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    settings = micro_settings(demo_shards, tmp_path, steps=2, zero_stage=0)
    _run(settings, tmp_path / "run")
    meta = json.loads((tmp_path / "run" / "checkpoints" / "step-000002" / "meta.json").read_text())
    names = [record["name"] for record in meta["files"]]
    assert sorted(names) == [
        "optimizer-00000-of-00001.safetensors",
        "random-00000-of-00001.safetensors",
        "weights.safetensors",
    ]
    assert all(len(record["sha256"]) == 64 for record in meta["files"])
    assert (meta["step"], meta["position"], meta["config"]["seed"]) == (2, 4, 0)


def test_paths_mean_the_same_to_workers_that_run_elsewhere(
    demo_shards: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validation = {"every": 2, "uri": "held_out"}
    settings = micro_settings(demo_shards, tmp_path, validation=validation, checkpoint_uri="s3://copies/here")
    monkeypatch.chdir(tmp_path)
    resolved = resolve_source_uris(settings, tmp_path / "data")
    assert resolved.train.validation.uri == str(tmp_path / "held_out")
    assert resolved.train.checkpoint_uri == "s3://copies/here"
    settings = micro_settings(demo_shards, tmp_path, checkpoint_uri="copies")
    assert resolve_source_uris(settings, tmp_path / "data").train.checkpoint_uri == str(tmp_path / "copies")
    for start, meant in (("start", str(tmp_path / "start")), ("models:/net@champion", "models:/net@champion")):
        model = settings.model.model_copy(update={"init_from": start})
        started = settings.model_copy(update={"model": model})
        assert resolve_source_uris(started, tmp_path / "data").model.init_from == meant


@pytest.mark.parametrize("names_shards", [True, False])
def test_a_recipe_that_names_shards_to_evaluate_is_evaluated_also_where_nothing_is_registered(
    demo_shards: dict[str, str], tmp_path: Path, names_shards: bool
) -> None:
    settings = micro_settings(demo_shards, tmp_path)
    evaluate = settings.evaluate.model_copy(update={"uri": demo_shards["segmentation"] if names_shards else None})
    registry = settings.registry.model_copy(update={"register_final": False})
    settings = settings.model_copy(update={"evaluate": evaluate, "registry": registry})
    folder = RunFolder(settings)
    with folder.locked():  # as the workers leave it
        resolved, sources = open_sources(settings, folder.data_dir)
        build_model(settings).save_pretrained(folder.model_dir)
        build_processor(settings).save_pretrained(folder.model_dir)
        groups = [source.group for source in settings.data.sources]
        digests = {f"{number}.{groups[number]}": source.dataset.digest for number, source in enumerate(sources)}
        done = asdict(WorkerResult(settings.train.steps, False, math.nan, None))
        folder.write(RunState("trained", None, identity_of(resolved), digests, settings.train.steps, done))
    result = train(settings, progress=False)
    assert ("giou" in result.metrics) == names_shards
    assert (result.registered_version, result.model_dir) == (None, str(folder.model_dir))
    assert train(settings, progress=False).already_finished
