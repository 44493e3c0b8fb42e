"""What a person sees of a run, what MLflow gets, and how a signal becomes a wish to stop."""

import io
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from micro_run import micro_settings

from pixellm.errors import CheckpointError, ClusterError, ConfigError, DataError, PixelLMError
from pixellm.jobs.train.channel import Channel, WorkerLine
from pixellm.jobs.train.events import (
    CheckpointEvent,
    StartEvent,
    StatusEvent,
    StepRecord,
    UploadEvent,
    ValidationEvent,
    WorkerPlace,
)
from pixellm.jobs.train.group import worker_cpus
from pixellm.jobs.train.interrupt import stop_on_signals
from pixellm.jobs.train.plan import speed_of_light
from pixellm.jobs.train.progress import TrainingView
from pixellm.jobs.train.run_folder import RunFolder, RunState, check_same_run, identity_of
from pixellm.platform.observability import ProgressLine
from pixellm.platform.settings import Settings


class RecordingTracker:
    """Keeps what would go to MLflow."""

    def __init__(self) -> None:
        self.metrics: list[tuple[int, dict[str, float]]] = []
        self.tags: dict[str, str] = {}

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        self.metrics.append((step, dict(metrics)))

    def set_tags(self, tags: dict[str, str]) -> None:
        self.tags |= tags


def _record(step: int, **changes: Any) -> StepRecord:
    values: dict[str, Any] = {
        "step": step,
        "loss": 3.0,
        "losses": {"text": 2.0, "ref": 0.75, "dice": 0.25},
        "lr": 1e-3,
        "grad_norm": 1.5,
        "is_applied": True,
        "num_samples": 8,
        "num_tokens": 800,
        "step_s": 0.5,
        "data_wait_s": 0.05,
    }
    return StepRecord(**(values | changes))


def _view(total: int = 10) -> tuple[TrainingView, io.StringIO, RecordingTracker]:
    stream, tracker = io.StringIO(), RecordingTracker()
    return TrainingView(total, ProgressLine(total, stream=stream, plain_every_s=0), tracker), stream, tracker  # type: ignore[arg-type]


def test_the_line_holds_step_loss_parts_rate_and_time_left() -> None:
    view, stream, _ = _view()
    view.take([StatusEvent("building the model"), StartEvent(0, None, ())])
    for step in (1, 2, 3):
        view.take([_record(step)])
    lines = stream.getvalue().splitlines()
    assert lines[0] == "building the model …"
    for wanted in (
        "step 3/10",
        "loss 3",
        "text 2",
        "ref 0.75",
        "dice 0.25",
        "lr 0.001",
        "grad 1.5",
        "16 samples/s",
        "left",
    ):
        assert wanted in lines[-1], wanted
    assert "data wait % 10" in lines[-1]


def test_mlflow_gets_every_step_with_its_parts() -> None:
    view, _, tracker = _view()
    view.take([_record(1), _record(2), CheckpointEvent(2, "/runs/a/step-000002", 0.3)])
    steps = [(step, values) for step, values in tracker.metrics if "loss" in values]
    assert [step for step, _ in steps] == [1, 2]
    assert steps[0][1] == {
        "loss": 3.0,
        "loss_text": 2.0,
        "loss_ref": 0.75,
        "loss_dice": 0.25,
        "lr": 1e-3,
        "grad_norm": 1.5,
        "samples_per_s": 16.0,
        "tokens_per_s": 1600.0,
        "data_wait_s": 0.05,
        "steps_skipped": 0,
    }
    assert tracker.tags["pixellm.last_checkpoint"] == "/runs/a/step-000002"
    assert view.last_checkpoint == "/runs/a/step-000002"


def test_faults_are_told_in_words() -> None:
    view, stream, _ = _view()
    view.take([StartEvent(4, "/runs/a/step-000004", ("step-000006 is damaged: weights",))])
    view.take([_record(5), _record(6, is_applied=False), CheckpointEvent(6, "/x", 0.1, problem="the disk is full")])
    view.take([StartEvent(4, "/runs/a/step-000004", ()), _record(5)])
    said = stream.getvalue()
    assert "step-000006 is damaged: weights; the checkpoint before it is used" in said
    assert "going on from /runs/a/step-000004" in said
    assert "step 6 was left out" in said
    assert "warning: the disk is full; training goes on" in said
    assert "a worker was lost after step 6; it goes on from step 4, 2 steps are repeated" in said
    assert len(view.recover_s) == 1
    assert "recovered in" in said
    assert view.steps_repeated == 1


def test_validations_copies_sizes_and_mfu_are_told() -> None:
    view, stream, tracker = _view()
    places = (WorkerPlace("n1", "left", 11), WorkerPlace("n2", "right", 12))
    view.flops_per_token, view.peak_flops = 1e6, 4e9
    view.take([StartEvent(0, None, (), places), _record(1)])
    assert "MFU % 20" in stream.getvalue()  # 1600 tokens/s × 1e6 operations on two devices of 4e9
    view.take([ValidationEvent(1, {"giou": 0.25, "text_loss": 2.0, "num_questions": 8}, True, None, 0.5)])
    view.take([UploadEvent(1, "s3://a", 2.0, 4), UploadEvent(2, "s3://a", 9.0, 6, "TimeoutError: no answer")])
    view.take([StartEvent(0, None, (), places[:1]), _record(1), StartEvent(1, None, (), places), _record(2)])
    said = stream.getvalue()
    assert "validation after step 1: giou 0.25, text_loss 2 (best)" in said
    assert "the checkpoint of step 1 was copied to s3://a at attempt 4" in said
    assert "warning: the checkpoint of step 2 was not copied to s3://a in 6 attempts: TimeoutError: no answer" in said
    assert "a worker was lost after step 1; it goes on from step 0 with 1 workers instead of 2" in said
    assert "the group grows after step 1; it goes on from step 1 with 2 workers instead of 1" in said
    assert (1, {"val_giou": 0.25, "val_text_loss": 2.0, "val_num_questions": 8, "val_s": 0.5}) in tracker.metrics
    assert len(view.recover_s) == 2


def test_elastic_groups_ask_for_what_the_recipe_says(tmp_path: Path) -> None:
    elastic = micro_settings({}, tmp_path, num_workers=[1, 4], grad_accumulation=3, worker_cpus=2.0)
    assert worker_cpus(elastic, 3.0) == 2.0
    with pytest.raises(ClusterError, match="2 logical CPUs; 1 workers"):
        worker_cpus(elastic, 2.0)


def test_the_peak_comes_from_the_recipe_or_the_device_that_ray_names(tmp_path: Path) -> None:
    on_cpu = micro_settings({}, tmp_path)
    assert speed_of_light(on_cpu, {"CPU": 2.0}) == (0.0, 0.0)
    on_gpu = micro_settings({}, tmp_path, use_gpu=True)
    flops, peak = speed_of_light(on_gpu, {"GPU": 1.0, "accelerator_type:H100": 1.0})
    assert peak == 989e12
    assert flops > 0
    assert speed_of_light(on_gpu, {"GPU": 1.0, "accelerator_type:OTHER": 1.0}) == (0.0, 0.0)
    told = on_gpu.model_copy(update={"plan": on_gpu.plan.model_copy(update={"peak_tflops": 100.0})})
    assert speed_of_light(told, {}) == (flops, 100e12)


def test_the_first_signal_asks_and_the_second_interrupts() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_signals() as stop:
        assert not stop.is_asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.is_asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_the_channel_hands_events_over_once_and_keeps_the_first_fatal_error() -> None:
    channel = Channel()
    channel.push(StatusEvent("a"))
    channel.push(StatusEvent("b"))
    assert [event.text for event in channel.drain()] == ["a", "b"]  # type: ignore[union-attr]
    assert channel.drain() == []
    assert channel.wishes() == (False, 0)
    channel.request_stop()
    channel.request_checkpoint()
    assert channel.wishes() == (True, 1)
    channel.set_fatal(DataError("first"))
    channel.set_fatal(DataError("second"))
    assert str(channel.fatal()) == "first"


def test_only_rank_zero_speaks() -> None:
    silent = WorkerLine(object(), is_active=False)
    silent.send(StatusEvent("nobody hears this"))
    assert not silent.is_stop_wanted()


def test_workers_leave_room_for_their_reading_tasks(tmp_path: Path) -> None:
    def cpus(total: float, workers: int) -> float:
        return worker_cpus(micro_settings({}, tmp_path, num_workers=workers), total)

    assert cpus(4, 2) == 1.0
    assert cpus(2, 2) == pytest.approx(0.5, abs=0.01)
    for total, workers in ((2, 2), (3, 2), (5, 4)):
        assert workers * (cpus(total, workers) + 0.5) <= total
    with pytest.raises(ClusterError, match=r"raise cluster\.num_cpus"):
        cpus(1, 2)


def _started(settings: Settings, **changes: Any) -> RunState:
    values: dict[str, Any] = {"state": "interrupted", "run_id": "r", "identity": identity_of(settings), "step": 4}
    return RunState(**(values | changes))


def test_what_a_run_computes_must_stay_and_how_it_runs_may_change(tmp_path: Path) -> None:
    settings = micro_settings({"vqa": "/data/a"}, tmp_path, num_workers=2, grad_accumulation=1)
    state = _started(settings)
    elsewhere = micro_settings(
        {"vqa": "/data/a"}, tmp_path, num_workers=1, grad_accumulation=2, zero_stage=0, keep_last=9
    )
    check_same_run(state, elsewhere, {})
    check_same_run(state, micro_settings({"vqa": "/data/a"}, tmp_path, num_workers=2, steps=60), {})
    with pytest.raises(ConfigError, match=r"train\.steps: was 6, now 3"):
        check_same_run(state, micro_settings({"vqa": "/data/a"}, tmp_path, num_workers=2, steps=3), {})
    with pytest.raises(ConfigError, match=r"global_batch_size: was 4, now 2"):
        check_same_run(state, micro_settings({"vqa": "/data/a"}, tmp_path, num_workers=1), {})
    with pytest.raises(PixelLMError, match=r"has changed since it started \(0\.vqa\)"):
        check_same_run(_started(settings, data_digests={"0.vqa": "old"}), settings, {"0.vqa": "new"})


def test_a_setting_that_an_earlier_version_did_not_have_was_its_default(tmp_path: Path) -> None:
    settings = micro_settings({"vqa": "/data/a"}, tmp_path)
    state = _started(settings)
    del state.identity["data.min_questions"]
    check_same_run(state, settings, {})
    asking_more = {"data": settings.data.model_copy(update={"min_questions": 2, "max_questions": 2})}
    with pytest.raises(ConfigError, match=r"data\.max_questions: was 1, now 2; data\.min_questions: was 1, now 2"):
        check_same_run(state, settings.model_copy(update=asking_more), {})


def test_a_run_folder_keeps_its_state_and_sets_a_former_run_aside(tmp_path: Path) -> None:
    folder = RunFolder(micro_settings({}, tmp_path))
    assert folder.read() == RunState()
    with folder.locked():
        assert folder.set_aside() is None
        folder.write(RunState("running", "r1"))
        assert folder.update(step=3) == RunState("running", "r1", step=3)
        folder.checkpoints.mkdir()
        aside = folder.set_aside()
        assert aside is not None
        assert (aside / "checkpoints").is_dir()
        assert folder.read() == RunState()
    (folder.path / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json cannot be read.*--fresh"):
        folder.read()
