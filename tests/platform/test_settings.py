"""The settings tree: recipes, overrides, and errors that name the mend."""

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pixellm.errors import ConfigError
from pixellm.platform.settings import Settings, find_recipe, from_environment, is_inside_ray_job, load_settings

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted((REPOSITORY / "recipes").rglob("*.yaml"))


def recipe(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_loads_and_survives_a_round_trip_through_yaml(path: Path, tmp_path: Path) -> None:
    settings = load_settings(path)
    assert load_settings(recipe(tmp_path, settings.to_yaml())) == settings


def test_the_released_hyper_parameters_are_the_defaults() -> None:
    train = load_settings().train
    assert (train.lr, train.betas, train.weight_decay, train.clip_norm) == (3e-4, (0.9, 0.95), 0.0, 1.0)
    assert (train.lora.r, train.lora.alpha, train.lora.target_modules) == (8, 16, ("q_proj", "v_proj"))


def test_overrides_are_laid_over_the_recipe_in_order_and_read_as_yaml(tmp_path: Path) -> None:
    path = recipe(
        tmp_path, "train: {lr: 0.5, steps: 7}\ndata: {sources: [{uri: a, group: vqa}, {uri: b, group: muse}]}\n"
    )
    settings = load_settings(
        path,
        [
            "--train.lr=1e-4",
            "train.betas=[0.5, 0.75]",
            "--train.use_gpu=true",
            "--train.lora.enabled=yes",
            "--data.sources.1.weight=4",
            "--train.lr=2e-4",
        ],
    )
    assert settings.train.lr == 2e-4
    assert settings.train.steps == 7
    assert settings.train.betas == (0.5, 0.75)
    assert settings.train.use_gpu
    assert settings.train.lora.enabled
    assert [source.weight for source in settings.data.sources] == [1.0, 4.0]


@pytest.mark.parametrize("number", ["1e-4", "1.0e-4", "1E-04", "0.0001", "+1e-4"])
def test_a_number_in_scientific_notation_is_a_number(number: str, tmp_path: Path) -> None:
    assert load_settings(recipe(tmp_path, f"train:\n  lr: {number}\n")).train.lr == pytest.approx(1e-4)


@pytest.mark.parametrize(
    ("text", "unknown", "near"),
    [
        ("train: {leraning_rate: 1}", "train.leraning_rate", "train."),
        ("train: {stepz: 1}", "train.stepz", "train.steps"),
        ("trian: {steps: 1}", "trian", "train"),
        ("train: {lora: {alhpa: 1}}", "train.lora.alhpa", "train.lora.alpha"),
        ("data: {sources: [{uri: x, group: vqa, wieght: 2}]}", "data.sources.0.wieght", "data.sources.weight"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_known_one(
    text: str, unknown: str, near: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(recipe(tmp_path, text))
    message = str(caught.value)
    assert unknown in message
    assert near in message
    assert "\n" not in message


def test_an_unknown_override_is_an_error_too() -> None:
    with pytest.raises(ConfigError, match=r"train\.lrr.*train\.lr"):
        load_settings(None, ["--train.lrr=1"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lr=fast", "train.lr"),
        ("train.lr=0", "greater than 0"),
        ("train.lr=.inf", "finite"),
        ("registry.gate_floor=.nan", "registry.gate_floor"),
        ("train.zero_stage=4", "train.zero_stage"),
        ("train.precision=fp8", "train.precision"),
        ("data.sources=[{uri: x, group: poetry}]", "data.sources.0.group"),
        ("name=a/b", "name"),
        ("serve.min_replicas=9", "max_replicas"),
        ("train.lr", "--section.key=value"),
        ("=1", "--section.key=value"),
        ("seed.x=1", "seed"),
        ("train.lr=[1", "YAML"),
        ("data.sources.0.weight=1", "data.sources"),
    ],
)
def test_a_value_that_does_not_fit_is_an_error_that_names_it(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(None, ["seed=1", override])
    assert said in str(caught.value)


def test_an_index_outside_a_list_is_an_error(tmp_path: Path) -> None:
    path = recipe(tmp_path, "data: {sources: [{uri: a, group: vqa}]}")
    with pytest.raises(ConfigError, match="index below 1"):
        load_settings(path, ["data.sources.1.weight=2"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"- a\n- b\n", "a list, wanted a mapping"),
        (b"train: {lr: 1\n", "not YAML"),
        (b"\xff\xfe\x00bad", "not UTF-8"),
        (b"train: {steps: 1}\ntrain: {steps: 2}\n", "given twice"),
    ],
)
def test_a_file_that_is_no_recipe_is_an_error_that_says_what_it_is(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)


def test_an_absent_recipe_is_an_error_that_lists_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="demo"):
        load_settings(tmp_path / "absent.yaml")


@pytest.mark.parametrize("text", ["", "# nothing\n", "train:\n  # steps: 3\n"])
def test_an_empty_recipe_or_section_means_the_defaults(text: str, tmp_path: Path) -> None:
    assert load_settings(recipe(tmp_path, text)) == Settings()


def test_a_packaged_recipe_is_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = load_settings(REPOSITORY / "recipes" / "demo.yaml")
    for name in ("demo", "demo.yaml", "recipes/demo.yaml"):
        assert load_settings(name) == wanted


def test_a_file_in_the_working_directory_goes_before_the_packaged_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").write_text("seed: 41\n", encoding="utf-8")
    assert load_settings("recipes/demo.yaml").seed == 41
    assert find_recipe("elsewhere/demo.yaml") == Path("elsewhere/demo.yaml")  # never by its last part alone


def test_the_tree_is_frozen() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError):
        settings.train.lr = 1.0  # type: ignore[misc]


def test_flat_names_every_leaf_once_with_its_value() -> None:
    def leaves(tree: dict[str, object], prefix: str = "") -> dict[str, str]:
        found: dict[str, str] = {}
        for key, value in tree.items():
            is_section = isinstance(value, dict) and bool(value)
            found |= leaves(value, f"{prefix}{key}.") if is_section else {prefix + key: str(value)}  # type: ignore[arg-type]
        return found

    settings = load_settings(None, ["train.lr=0.25", "model.overrides={num_scales: 1}"])
    assert settings.flat() == leaves(yaml.safe_load(settings.to_yaml()))
    assert settings.flat()["train.lr"] == "0.25"
    assert settings.flat()["model.overrides.num_scales"] == "1"


def test_global_batch_size_counts_all_workers_and_accumulation_steps() -> None:
    assert (
        load_settings(
            None, ["train.num_workers=3", "train.micro_batch_size=5", "train.grad_accumulation=7"]
        ).train.global_batch_size
        == 105
    )


def test_only_the_documented_environment_variables_that_are_set_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in from_environment():
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://m")
    monkeypatch.setenv("PIXELLM_UNKNOWN", "1")
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert from_environment() == {"MLFLOW_TRACKING_URI": "http://m"}


def test_a_submitted_job_knows_that_it_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    assert not is_inside_ray_job()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert is_inside_ray_job()


def test_a_folder_of_its_name_does_not_hide_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()  # what `pixellm demo` leaves
    assert load_settings("demo").name == "demo"


def test_more_questions_at_least_than_at_most_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="min_questions 3 is above max_questions 2"):
        load_settings(recipe(tmp_path, "data: {min_questions: 3, max_questions: 2}\n"))
