"""The whole job: two Ray Train workers with DeepSpeed, registry, going on, and a real Ctrl-C to a real process."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from micro_run import micro_settings, micro_tree
from test_train_resume import RecordingLine, worker_spec

from pixellm.errors import ConfigError
from pixellm.jobs import models
from pixellm.jobs.train.run import train
from pixellm.jobs.train.worker import run_worker
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.platform.settings import Settings
from pixellm.platform.tracking import connect_store, store_address

DEADLINE_S = 280
pytestmark = pytest.mark.timeout(2 * DEADLINE_S)  # workers start several times: 257 s were seen on a slow machine


def _curve(settings: Settings, run_id: str) -> dict[int, float]:
    client = connect_store(store_address(settings.tracking))
    return {metric.step: metric.value for metric in client.get_metric_history(run_id, "loss")}


def test_two_workers_train_register_and_go_on_as_one_process_would(
    ray_cluster: str, process_group: None, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    settings = micro_settings(demo_shards, tmp_path, num_workers=2, checkpoint_every=3)
    result = train(settings, progress=False)
    assert (result.steps, result.interrupted, result.resumed_from) == (6, False, None)
    assert result.registered_version == 1
    assert result.metrics["num_questions"] == 8  # four composed, four MUSE
    assert "version" in result.promotion or "models:/" in result.promotion
    version = models.show_version("models:/pixellm@candidate", settings.tracking).version
    assert version.metrics["giou"] == pytest.approx(result.metrics["giou"])

    # The same global batches in one process without Ray: two micro-batches in place of two ranks.
    line = RecordingLine()
    alone = micro_settings(demo_shards, tmp_path, grad_accumulation=2)
    run_worker(worker_spec(alone, tmp_path / "alone"), line)  # type: ignore[arg-type]
    expected = {record.step: record.loss for record in line.steps}
    # A fixed group clips by DeepSpeed's norm, rounded on each rank; an elastic one is exact (test_train_faults).
    assert _curve(settings, result.run_id) == pytest.approx(expected, rel=1e-5)

    run_dir = tmp_path / "runs" / "micro"
    meta = json.loads((run_dir / "checkpoints" / "step-000006" / "meta.json").read_text())
    assert (meta["world_size"], meta["position"]) == (2, 6 * 4)
    assert sorted(record["name"] for record in meta["files"]) == [
        "optimizer-00000-of-00002.safetensors",
        "optimizer-00001-of-00002.safetensors",
        "random-00000-of-00002.safetensors",
        "random-00001-of-00002.safetensors",
        "weights.safetensors",
    ]
    PixelLMForConditionalGeneration.from_pretrained(result.model_dir)

    again = train(settings, progress=False)
    assert again.already_finished
    assert (again.steps, again.registered_version) == (6, 1)
    assert "already finished at step 6" in again.to_text()
    assert "--fresh" in again.to_text()
    assert len(models.list_versions("pixellm", settings.tracking).versions) == 1

    with pytest.raises(ConfigError, match=r"train\.lr: was 0\.001, now 0\.002.*--fresh"):
        train(micro_settings(demo_shards, tmp_path, num_workers=2, checkpoint_every=3, lr=2e-3), progress=False)


def _start(recipe: Path) -> "subprocess.Popen[str]":
    """`pixellm train` in a process group of its own, as a shell would start it."""
    environment = os.environ | {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2"}
    environment.pop("RAY_ADDRESS", None)
    command = "import sys; sys.argv[0] = 'pixellm'; from pixellm.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", command, "train", "--config", str(recipe), "--cluster.address=local"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        cwd=recipe.parent,
        env=environment,
    )


def _wait_for_line(process: "subprocess.Popen[str]", text: str) -> list[str]:
    """Reads the process's standard error until a line holds `text`; a timer ends a process that never says it."""
    timer = threading.Timer(DEADLINE_S, process.kill)
    timer.start()
    lines: list[str] = []
    try:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if text in line:
                return lines
    finally:
        timer.cancel()
    raise AssertionError(f"{text!r} never came; got {''.join(lines)[-3000:]}")


@pytest.mark.drill  # two trainings: two to five minutes
def test_ctrl_c_leaves_a_checkpoint_and_the_same_run_goes_on(
    ray_cluster: str, demo_shards: dict[str, str], tmp_path: Path
) -> None:
    recipe = tmp_path / "recipe.yaml"
    tree = micro_tree(demo_shards, tmp_path, num_workers=2, steps=3000, checkpoint_every=1000)
    recipe.write_text(yaml.safe_dump(tree))
    process = _start(recipe)
    _wait_for_line(process, "/3000 · loss")  # the line of a busy machine skips steps
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to every process of the group
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130, errors[-3000:]
    assert "Traceback" not in errors
    assert "stopping after this step" in errors
    checkpoints = tmp_path / "runs" / "micro" / "checkpoints"
    (step,) = [int(path.name.removeprefix("step-")) for path in checkpoints.iterdir()]
    assert 1 <= step < 3000
    assert f"stopped after step {step}; checkpoint: {checkpoints / f'step-{step:06d}'}" in output
    assert "the same command goes on" in output
    settings = Settings.model_validate(tree)
    state = json.loads((tmp_path / "runs" / "micro" / "run.json").read_text())
    client = connect_store(store_address(settings.tracking))
    assert client.get_run(state["run_id"]).info.status == "KILLED"

    longer = settings.train.model_copy(update={"steps": step + 2})
    result = train(settings.model_copy(update={"train": longer}), progress=False)
    assert (result.steps, result.resumed_from, result.run_id) == (step + 2, step, state["run_id"])
    assert result.registered_version == 1
    assert client.get_run(state["run_id"]).info.status == "FINISHED"
    assert set(_curve(settings, state["run_id"])) == set(range(1, step + 3))


def test_a_second_driver_in_the_same_run_folder_is_refused(demo_shards: dict[str, str], tmp_path: Path) -> None:
    from pixellm.jobs.train.run_folder import RunFolder

    settings = micro_settings(demo_shards, tmp_path)
    with RunFolder(settings).locked(), pytest.raises(ConfigError, match=rf"another process \(pid {os.getpid()}\)"):
        train(settings, progress=False)


def test_contradictions_and_missing_data_show_before_anything_is_started(
    demo_shards: dict[str, str], tmp_path: Path
) -> None:
    both = micro_settings(demo_shards, tmp_path, lora={"enabled": True})
    with pytest.raises(ConfigError, match="exclude each other"):
        train(both, progress=False)
    with pytest.raises(ConfigError, match=r"set data\.sources"):
        train(micro_settings({}, tmp_path), progress=False)
    with pytest.raises(ConfigError, match="no demo data 'birds'"):
        train(micro_settings({"muse": "demo:birds"}, tmp_path), progress=False)
    assert not (tmp_path / "mlflow").exists()
