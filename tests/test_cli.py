"""What the command line makes of wrong input: one line on standard error and an exit code, never a traceback."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import pixellm
from pixellm.cli import main
from pixellm.jobs.prepare import prepare_demo

Call = Callable[..., tuple[int, str, str]]
WRONG_USAGE, FAILED = 2, 1


def no_cluster() -> None:
    raise AssertionError("wrong input is to be refused before Ray starts")


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Runs a command in an empty folder; returns its exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)
    for variable in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pixellm.platform.cluster.connect", no_cluster)

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pixellm", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["predict", "a.png", "q", "--model", "m", "--out", "s3://bucket/x"], WRONG_USAGE, "s3://bucket/x"),
        (["jobs", "list"], WRONG_USAGE, "--address http://HEAD:8265"),
        (["jobs", "status", "x", "--address", "http://127.0.0.1:99999"], WRONG_USAGE, "http://HEAD:8265"),
        (["jobs", "stop", "x", "--address", "http://[::1"], WRONG_USAGE, "http://HEAD:8265"),
        (["query", __file__, "q", "--url", "http://[::1"], WRONG_USAGE, "http://127.0.0.1:8000"),
        (["query", __file__, "q", "--url", "foo"], WRONG_USAGE, "http://127.0.0.1:8000"),
        (["train", "--dry-run", "--train.output_dir=s3://b/runs"], WRONG_USAGE, "checkpoint_uri"),
        (["data", "stats", "hdfs://localhost/x"], FAILED, "hdfs://localhost/x"),
        (["data", "prepare", "bogus", "--out", "x"], WRONG_USAGE, "bogus"),
        (["data", "prepare", "coco", "--out", "x"], WRONG_USAGE, "--in"),
        (["models", "show", "foo"], FAILED, "models:/NAME@alias"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_ends_in_one_line(call: Call, words: list[str], code: int, said: str) -> None:
    ended, out, err = call(*words)
    assert (ended, out) == (code, "")
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1


def test_a_place_that_cannot_be_written_ends_in_one_line(call: Call, tmp_path: Path) -> None:
    shards = prepare_demo(tmp_path / "shards")
    for words in (["show", "--out"], ["show", "--html"], ["stats", "--plot"], ["stats", "--html"]):
        ended, _out, err = call("data", words[0], shards["muse"], words[1], "/proc/none/x.png")
        assert ended == FAILED
        assert err.splitlines()[-1].startswith("error: ")
        assert "/proc/none" in err
        assert "Traceback" not in err


def test_a_wrong_log_level_is_wrong_usage(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIXELLM_LOG_LEVEL", "loud")
    ended, _out, err = call("models", "list")
    assert ended == WRONG_USAGE
    assert err.startswith("error: the log level is 'LOUD'")


def test_the_resolved_settings_are_printed_as_a_recipe_and_as_json(call: Call) -> None:
    words = ["train", "--config", "tiny", "--train.steps=7", "--print-config"]
    ended, out, _err = call(*words)
    assert ended == 0
    as_recipe = yaml.safe_load(out)
    assert as_recipe["train"]["steps"] == 7
    assert as_recipe["train"]["clip_norm"] == 1.0  # a default, resolved
    assert json.loads(call(*words, "--json")[1]) == json.loads(json.dumps(as_recipe))


def test_help_of_submit_names_all_that_it_takes(call: Call) -> None:
    _ended, out, _err = call("submit", "--help")
    assert all(word in out for word in ("--address", "--wait", "--secret", "COMMAND"))


def test_the_public_names_are_these() -> None:
    assert sorted(pixellm.__all__) == [
        "PixelLMClient",
        "PixelLMConfig",
        "PixelLMEngine",
        "PixelLMError",
        "PixelLMForConditionalGeneration",
        "PixelLMProcessor",
        "SegmentationResult",
        "TargetMask",
    ]


@pytest.mark.parametrize("command", ["demo", "serve", "up"])
def test_a_number_that_is_no_port_is_wrong_usage(call: Call, command: str) -> None:
    ended, _out, err = call(command, "--port", "99999")
    assert ended == WRONG_USAGE
    assert "--port" in err
    assert "Traceback" not in err


def test_promote_takes_the_gates_on_the_command_line(call: Call) -> None:
    import mlflow

    client = mlflow.MlflowClient("sqlite:///runs/mlflow/mlflow.db")
    client.create_registered_model("pixellm")
    for ciou in (0.6, 0.5, 0.597):
        tags = {"metric.muse.giou": "0.41", "metric.mrefcoco.ciou": str(ciou)}
        client.create_model_version("pixellm", "file:///nowhere", tags=tags)
    gates = ["--to", "champion", "--require", "muse.giou>=0.40", "--no-regression", "mrefcoco.ciou:0.5"]
    promote = ["models", "promote"]

    assert call(*promote, "models:/pixellm/1", *gates)[0] == 0
    ended, out, _err = call(*promote, "models:/pixellm/2", *gates)
    assert ended == FAILED
    assert "mrefcoco.ciou 0.5 is more than 0.005 below the champion's 0.6" in out
    client.set_registered_model_alias("pixellm", "candidate", "3")
    ended, out, _err = call(*promote, *gates, "--json")  # the candidate when none is named
    assert (ended, json.loads(out)["champion_now"]) == (0, 3)
    ended, _out, err = call(*promote, "models:/pixellm/1", "--require", "muse.giou>0.4")
    assert (ended, "METRIC>=VALUE" in err) == (WRONG_USAGE, True)
