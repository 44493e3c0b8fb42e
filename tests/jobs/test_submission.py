"""What is handed to a cluster for a command: planned without one."""

import shlex
from pathlib import Path

import pytest

from pixellm.errors import ConfigError
from pixellm.jobs.submission import RECIPE_FILE, parse_submit_words, plan_submission, refuse_secrets
from pixellm.platform.settings import Settings, check_secrets, load_settings

HERE = Path("/caller's folder")


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "PIXELLM_LOG_LEVEL", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def shipped(command: list[str], tmp_path: Path, *, caller_dir: Path = HERE, is_head_local: bool = True) -> Settings:
    plan = plan_submission(command, caller_dir=caller_dir, is_head_local=is_head_local)
    path = tmp_path / "shipped.yaml"
    path.write_text(plan.files[RECIPE_FILE], encoding="utf-8")
    return load_settings(path)


def test_the_options_of_submit_may_stand_anywhere_among_the_words() -> None:
    for words in (
        "train --config a.yaml --address http://h:1 --wait --train.lr=1",
        "--address=http://h:1 train --wait --config a.yaml --train.lr=1",
        "--follow --address http://h:1 train --config a.yaml --train.lr=1",
    ):
        options = parse_submit_words(words.split())
        assert (options.address, options.wait) == ("http://h:1", True)
        assert options.command == ("train", "--config", "a.yaml", "--train.lr=1")
    assert parse_submit_words(["evaluate"]).wait is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "no command"),
        (["--wait"], "no command"),
        (["--nonsense", "train"], "no command"),
        (["train", "--address"], "--address needs a value"),
        (["submit", "train"], "runs where you are"),
        (["demo"], "runs where you are"),
    ],
)
def test_words_that_submit_nothing_are_wrong_usage(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_submit_words(words)


def test_the_recipe_travels_resolved_so_that_neither_file_nor_overrides_are_needed_there(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("seed: 5\ntrain: {steps: 11, output_dir: /out}\ntracking: {root: /m}\n")
    command = ["train", "--fresh", f"--config={tmp_path / 'mine.yaml'}", "--train.lr=0.25"]
    assert shipped(command, tmp_path) == load_settings(tmp_path / "mine.yaml", ["train.lr=0.25"])
    plan = plan_submission(command, caller_dir=HERE, is_head_local=True)
    assert str(tmp_path) not in plan.entrypoint
    assert "lr" not in plan.entrypoint
    assert "--fresh" in shlex.split(plan.entrypoint)


def test_a_packaged_recipe_is_named_as_in_the_repository_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = shipped(["train", "--config", "recipes/demo.yaml"], tmp_path)
    assert settings.train.steps == load_settings("demo").train.steps


def test_on_this_machine_relative_places_are_the_callers(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    command = ["train", "--data.sources=[{uri: shards, group: vqa}, {uri: absent, group: muse}]"]
    more = ["--model.init_from=models:/pixellm@champion", "--evaluate.uri=s3://b/e", "--cluster.address=h:1"]
    settings = shipped([*command, *more], tmp_path, caller_dir=tmp_path)
    assert settings.train.output_dir == str(tmp_path / "runs")
    assert settings.tracking.root == str(tmp_path / "runs" / "mlflow")
    assert [source.uri for source in settings.data.sources] == [str(tmp_path / "shards"), "absent"]
    assert settings.model.init_from == "models:/pixellm@champion"
    assert settings.evaluate.uri == "s3://b/e"
    assert settings.cluster.address is None  # the job joins the cluster that it runs on


def test_on_this_machine_the_job_runs_in_the_callers_folder_and_reads_the_shipped_recipe() -> None:
    plan = plan_submission(["train"], caller_dir=HERE, is_head_local=True)
    change, run = plan.entrypoint.split(" && ")
    assert shlex.split(change) == ["cd", str(HERE)]
    assert run == 'exec python3 -P -m pixellm.job train --config "$OLDPWD/recipe.yaml"'


@pytest.mark.parametrize("knob", ["train.output_dir", "tracking.root"])
def test_elsewhere_a_place_on_this_machine_is_refused_and_the_knob_named(knob: str) -> None:
    overrides = {"train.output_dir": "/shared/runs", "tracking.root": "/shared/mlflow"} | {knob: "runs"}
    command = ["train", *(f"--{key}={value}" for key, value in overrides.items())]
    with pytest.raises(ConfigError, match=f"--{knob}="):
        plan_submission(command, caller_dir=HERE, is_head_local=False)


def test_elsewhere_data_in_a_folder_of_this_machine_is_refused(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    command = ["train", "--train.output_dir=/s", "--tracking.root=/m", "--data.sources=[{uri: shards, group: vqa}]"]
    with pytest.raises(ConfigError, match=r"data\.sources\.0\.uri"):
        plan_submission(command, caller_dir=tmp_path, is_head_local=False)


def test_elsewhere_the_job_stays_in_its_own_folder(tmp_path: Path) -> None:
    command = ["train", "--train.output_dir=/shared/runs", "--tracking.root=/shared/mlflow"]
    plan = plan_submission(command, caller_dir=HERE, is_head_local=False)
    assert plan.entrypoint == 'python3 -P -m pixellm.job train --config "$PWD/recipe.yaml"'
    assert shipped(command, tmp_path, is_head_local=False).train.output_dir == "/shared/runs"


def test_other_commands_travel_as_they_are_word_for_word() -> None:
    command = ["predict", "a b.jpg", "What is `that`, $HOME?", "--model", "models:/pixellm@champion"]
    plan = plan_submission(command, caller_dir=HERE, is_head_local=False)
    assert shlex.split(plan.entrypoint) == ["python3", "-P", "-m", "pixellm.job", *command]
    assert plan.files == {}
    assert plan.metadata == {"pixellm.command": shlex.join(command)}


def test_stopping_a_job_is_a_ctrl_c_with_time_for_a_checkpoint() -> None:
    variables = plan_submission(["train"], caller_dir=HERE, is_head_local=True).env_vars
    assert variables["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert float(variables["RAY_JOB_STOP_WAIT_TIME_S"]) >= 60


def test_the_callers_store_is_the_jobs_store_but_never_with_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://mlflow.example")
    plan = plan_submission(["models", "list"], caller_dir=HERE, is_head_local=False)
    assert plan.env_vars["MLFLOW_TRACKING_URI"] == "https://mlflow.example"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:secret@mlflow.example")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        plan_submission(["models", "list"], caller_dir=HERE, is_head_local=False)
    assert "secret" not in str(caught.value)


def test_an_unknown_key_is_refused_here_and_not_on_the_cluster() -> None:
    with pytest.raises(ConfigError, match=r"train\.steps"):
        plan_submission(["train", "--train.stepz=1"], caller_dir=HERE, is_head_local=True)
    with pytest.raises(ConfigError, match="--config needs a value"):
        plan_submission(["train", "--config"], caller_dir=HERE, is_head_local=True)


def test_secrets_travel_by_name_and_a_value_in_clear_is_refused_without_showing_it() -> None:
    options = parse_submit_words(["muse", "generate", "--secret", "OPENAI_API_KEY", "--secret=HF_TOKEN"])
    assert options.secrets == ("OPENAI_API_KEY", "HF_TOKEN")
    plan = plan_submission(options.command, caller_dir=HERE, is_head_local=True, secrets=options.secrets)
    assert plan.env_vars["PIXELLM_SECRETS"] == "OPENAI_API_KEY,HF_TOKEN"
    refuse_secrets(plan, {"OPENAI_API_KEY": "sk-0123456789", "HOME": str(HERE)})
    with pytest.raises(ConfigError, match="never its value"):
        parse_submit_words(["muse", "--secret", "sk-0123456789"])
    clear = plan_submission(["muse", "--base-url", "https://h/?k=sk-0123456789"], caller_dir=HERE, is_head_local=True)
    with pytest.raises(ConfigError, match="--secret OPENAI_API_KEY") as caught:
        refuse_secrets(clear, {"OPENAI_API_KEY": "sk-0123456789"})
    assert "sk-" not in str(caught.value)


def test_a_job_whose_secret_the_cluster_does_not_hold_says_so_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    check_secrets()
    monkeypatch.setenv("PIXELLM_SECRETS", "FIRST_KEY,SECOND_KEY")
    monkeypatch.setenv("FIRST_KEY", "x")
    with pytest.raises(ConfigError, match="the job wants SECOND_KEY, which the cluster does not hold"):
        check_secrets()


@pytest.mark.parametrize("words", [["--in", "photos", "--out", "/o"], ["--in", "s3://b/i", "--out=answers"]])
def test_elsewhere_a_relative_place_of_any_command_is_refused(words: list[str]) -> None:
    command = ["predict", "Why?", "--model", "models:/m/1", *words]
    with pytest.raises(ConfigError, match=r"--(in|out) is '(photos|answers)', a path of this machine"):
        plan_submission(command, caller_dir=HERE, is_head_local=False)
    assert plan_submission(command, caller_dir=HERE, is_head_local=True).files == {}
