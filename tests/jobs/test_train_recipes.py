"""Every shipped recipe loads, says what the paper or the released code does, and builds a network where it is small."""

from pathlib import Path

import pytest

from pixellm.errors import ConfigError
from pixellm.jobs.train.build import trained_parts
from pixellm.model.config import PixelLMConfig
from pixellm.platform.data.order import quantise
from pixellm.platform.settings import TrainSettings, load_settings

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
NAMES = sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_recipe_loads_by_name_and_describes_a_whole_run(name: str) -> None:
    settings = load_settings(f"recipes/{name}.yaml")
    assert settings == load_settings(name)
    PixelLMConfig.from_preset(settings.model.preset, **settings.model.overrides)
    trained_parts(settings.train)
    quantise([source.weight for source in settings.data.sources])
    assert settings.train.warmup_steps < settings.train.steps


def test_the_7b_recipe_says_the_released_hyper_parameters_in_its_own_text() -> None:
    import yaml

    written = yaml.safe_load((RECIPES / "pixellm-7b.yaml").read_text())["train"]
    released = {"steps": 5000, "lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.0, "warmup_steps": 100}
    released |= {"clip_norm": 1.0, "precision": "bf16", "zero_stage": 2, "gradient_checkpointing": True}
    assert {key: written[key] for key in released} == released
    assert written["lora"] == {
        "enabled": True,
        "r": 8,
        "alpha": 16,
        "dropout": 0.05,
        "target_modules": ["q_proj", "v_proj"],
    }
    for name in ("pixellm-7b", "pixellm-13b"):
        settings = load_settings(name)
        assert settings.train.global_batch_size == 160
        assert settings.data.group_weights == {"semantic": 2, "referring": 9, "vqa": 2, "muse": 4}
        assert {source.group for source in settings.data.sources} == set(settings.data.group_weights)
        assert {source.weight for source in settings.data.sources} == {1.0}  # uniform within a group


def test_the_ablations_differ_from_the_full_method_in_what_their_table_varies_only() -> None:
    full = load_settings("ablations/full").flat()
    varied = {}
    for name in NAMES:
        if name.startswith("ablations/") and name != "ablations/full":
            flat = load_settings(name).flat()
            varied[name.removeprefix("ablations/")] = {key: flat[key] for key in flat if flat[key] != full.get(key)}
    assert all(changes.pop("name") == f"ablation-{name}" for name, changes in varied.items())
    n, scales, alpha = (
        f"model.overrides.{key}" for key in ("tokens_per_scale", "num_scales", "target_refinement_alpha")
    )
    assert varied.pop("scales-2") == {}
    assert varied.pop("tokens-3") == {}
    assert [varied.pop(f"scales-{count}") for count in (1, 3)] == [{scales: "1"}, {scales: "3"}]
    assert [varied.pop(f"tokens-{count}") for count in (1, 2, 4)] == [{n: "1"}, {n: "2"}, {n: "4"}]
    assert varied.pop("fusion-only") == {alpha: "1.0"}
    assert varied.pop("refinement-only") == {n: "1"}
    assert varied.pop("pixellm-dagger") == {n: "1", alpha: "1.0"}
    assert {name: set(changes) for name, changes in varied.items()} == {
        "data-250": {"data.sources"},
        "data-1000": {"data.sources"},
    }
    for amount in (250, 1000):
        (source,), (whole,) = (load_settings(f"ablations/{name}").data.sources for name in (f"data-{amount}", "full"))
        assert source == whole.model_copy(update={"max_samples": amount})


def test_a_recipe_that_extends_another_says_only_what_differs(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 3\ntrain: {lr: 1e-4, steps: 7, betas: [0.8, 0.9]}\n")
    (tmp_path / "more.yaml").write_text("extends: base.yaml\ntrain: {steps: 9}\n")
    settings = load_settings(tmp_path / "more.yaml", ["--train.lr=2e-4"])
    assert (settings.seed, settings.train.steps, settings.train.lr, settings.train.betas) == (3, 9, 2e-4, (0.8, 0.9))
    (tmp_path / "base.yaml").write_text("extends: more.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_settings(tmp_path / "more.yaml")
    (tmp_path / "lost.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*nowhere\.yaml"):
        load_settings(tmp_path / "lost.yaml")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_workers": (4, 2)}, r"\[least, most\]"),
        ({"num_workers": (1, 4), "grad_accumulation": 1}, "4 micro-batches of a step cannot be shared equally by 3"),
        ({"lr_scale": {"decodr": 2.0}}, "lr_scale names 'decodr'"),
        ({"validation": {"keep_best": 1}}, r"need validation\.every"),
        ({"validation": {"every": 5, "finish_with_best": True}}, r"needs validation\.keep_best"),
    ],
)
def test_training_settings_that_do_not_fit_together_are_refused(values: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TrainSettings.model_validate(values)


def test_an_elastic_run_keeps_its_global_batch_size() -> None:
    train = TrainSettings(num_workers=(1, 4), micro_batch_size=2, grad_accumulation=3)
    assert (train.min_workers, train.max_workers, train.is_elastic) == (1, 4, True)
    assert train.global_batch_size == 24
    assert not TrainSettings(num_workers=2).is_elastic
