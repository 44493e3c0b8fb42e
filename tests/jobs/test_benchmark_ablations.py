"""The ablation benchmark: which trainings are shared, and the arithmetic of its tables."""

import math
from pathlib import Path

import pytest
import torch

from benchmarks.ablations import (
    METRICS,
    SHUFFLED,
    TABLES,
    Run,
    as_text,
    begun_as,
    mean_and_error,
    row,
    same_runs,
    settings_of,
)
from pixellm.jobs.train.build import build_model, build_processor


def test_recipes_that_come_to_the_same_settings_are_trained_once_per_seed() -> None:
    recipes = [*dict.fromkeys(recipe for names in TABLES.values() for recipe in names), SHUFFLED]
    chosen = same_runs([Run(recipe, seed, 40) for seed in (0, 1) for recipe in recipes])
    of_first_seed = {run.recipe: chosen[run].recipe for run in chosen if run.seed == 0}
    same = {"tokens-3": "scales-2", "full": "scales-2", "refinement-only": "tokens-1"}
    assert of_first_seed == {recipe: same.get(recipe, recipe) for recipe in recipes}
    assert all(chosen[run].seed == run.seed for run in chosen)


def test_a_training_differs_from_its_recipe_in_length_place_and_threads_only() -> None:
    run = Run("tokens-2", seed=5, steps=40)
    flat = settings_of(run, Path("shards"), Path("out")).flat()
    full = settings_of(Run("full", seed=5, steps=40), Path("shards"), Path("out")).flat()
    assert {key for key in flat if flat[key] != full[key]} == {"name", "model.overrides.tokens_per_scale"}
    assert (flat["seed"], flat["train.steps"], flat["train.num_workers"]) == ("5", "40", "1")
    control = settings_of(Run(SHUFFLED, seed=5, steps=40), Path("shards"), Path("out"))
    assert control.data.sources[0].uri == str(Path("shards/train-shuffled"))
    assert control.model == settings_of(Run("full", seed=5, steps=40), Path("shards"), Path("out")).model


def test_a_start_gives_words_language_and_sight_to_a_recipe_with_other_codebook_tokens(tmp_path: Path) -> None:
    full = settings_of(Run("full", seed=7, steps=40), tmp_path, tmp_path)
    start = build_model(full)
    start.save_pretrained(tmp_path / "start")
    build_processor(full).save_pretrained(tmp_path / "start")
    own = settings_of(Run("tokens-1", seed=5, steps=40), tmp_path, tmp_path)

    settings = begun_as(tmp_path / "start", own, tmp_path / "begun")

    began, drawn, learned = (
        dict(model.named_parameters()) for model in (build_model(settings), build_model(own), start)
    )
    num_words = min(start.config.codebook_token_ids)
    for name, weight in began.items():
        if name.startswith(("language_model.layers.", "language_model.norm.", "vision_tower.", "image_projector.")):
            assert torch.equal(weight, learned[name]), name
        elif name in ("language_model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(weight[:num_words], learned[name][:num_words])
            assert torch.equal(weight[num_words:-2], drawn[name][num_words:-2])
            assert torch.equal(weight[-2:], learned[name][-2:])
        else:
            assert torch.equal(weight, drawn[name]), name


def test_means_come_with_their_standard_errors() -> None:
    mean, error = mean_and_error([0.2, 0.4, 0.9])
    assert mean == pytest.approx(0.5)
    assert error == pytest.approx(math.sqrt((0.09 + 0.01 + 0.16) / 2 / 3))
    assert math.isnan(mean_and_error([0.3])[1])


def test_a_row_holds_every_metric_and_prints_in_percent() -> None:
    results = [dict.fromkeys(METRICS, value) for value in (0.25, 0.5, 0.75)]
    figures = row("tokens-2", results)
    assert (figures["recipe"], figures["seeds"], figures["giou_mean"]) == ("tokens-2", 3, 0.5)
    assert figures["giou_stderr"] == pytest.approx(0.25 / math.sqrt(3))
    text = as_text("tokens", [figures])
    assert "| tokens-2 | 3 | 50.0 ± 14.4 |" in text
    alone = row("full", results[:1])
    assert alone["giou_stderr"] is None
    assert "| full | 1 | 25.0 |" in as_text("one seed", [alone])
