"""Every baseline at tiny size through every suite, by the evaluation job; LISA through training to its evaluation."""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "model"))  # for `from baseline_folders import …`

from baseline_folders import BASELINES, write_clipseg, write_lisa, write_lisa_aug, write_lisa_rec
from evaluate_case import write_case
from micro_run import micro_tree

from pixellm.errors import ConfigError
from pixellm.jobs.evaluate.answers import ForcedAnswers, GeneratedAnswers
from pixellm.jobs.evaluate.job import Evaluation, EvaluationOptions, evaluate_suite, read_samples
from pixellm.jobs.evaluate.method import method_of
from pixellm.jobs.evaluate.suites import SUITES
from pixellm.jobs.train.build import build_model, build_processor, save_model_folder
from pixellm.jobs.train.encode import SampleEncoder
from pixellm.model.baselines import text_prompted
from pixellm.model.config import PixelLMConfig
from pixellm.model.conversation import MERGED_ANSWER
from pixellm.model.flops import count_flops
from pixellm.model.networks import load_network
from pixellm.platform.data.compose import ComposeLimits, QuestionSource
from pixellm.platform.data.order import Draw
from pixellm.platform.settings import Settings, load_settings

QUICK = EvaluationOptions(with_report=False, batch_size=4)


class _KeptOpen(GeneratedAnswers):
    """Loaded once for all suites: the job closes what it opened."""

    def close(self) -> None:
        """Stays open."""

    def really_close(self) -> None:
        """Lets go of the model."""
        super().close()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two pictures with a question for every suite."""
    return write_case(tmp_path_factory.mktemp("case") / "shards", 2)


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_goes_through_every_suite(
    name: str, shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_prompted, "BOX_THRESHOLD", 0.0)  # random weights are sure of nothing
    monkeypatch.setattr(text_prompted, "SAM3_THRESHOLD", 0.0)
    model = _KeptOpen(BASELINES[name](tmp_path / "model"), max_new_tokens=8)
    for suite in SUITES:
        out = tmp_path / suite.replace("+", "-plus")
        result = evaluate_suite(name, shards, out, suite, QUICK, open_answerer=lambda _: model)
        assert result.questions == (4 if suite == "reasonseg" else 2)
        for figure in ("giou", "ciou", "giou_merged", "ciou_merged"):
            assert 0 <= result.metrics[figure] <= 1
        assert result.metrics["mean_targets_returned"] > 0
        if name == "lisa":
            assert result.metrics["mean_targets_returned"] <= 1
    model.really_close()


def test_the_job_opens_what_the_folder_says(shards: str, tmp_path: Path) -> None:
    def run(model: Path) -> Evaluation:
        return evaluate_suite(model, shards, tmp_path / f"{model.name}-out", "muse", QUICK)

    run(write_clipseg(tmp_path / "clipseg"))
    assert {sample["answer"] for sample in read_samples(tmp_path / "clipseg-out")} == {
        "How can I cross the lake [1].",
    }
    rec = write_lisa_rec(tmp_path / "rec")
    first = run(rec)
    (rec / "lisa" / "config.json").touch()
    assert run(rec).metrics == first.metrics
    write_lisa_aug(rec / "lisa")  # another model in the same folder is another evaluation
    with pytest.raises(ConfigError, match="model_files"):
        run(rec)


def test_the_report_names_the_method_and_counts_it_beside_the_papers(shards: str, tmp_path: Path) -> None:
    options = EvaluationOptions(batch_size=4, limit=1)
    result = evaluate_suite(write_lisa(tmp_path / "lisa"), shards, tmp_path / "out", "muse", options)
    assert result.method == "LISA"
    assert result.tflops == pytest.approx(count_flops("lisa-tiny").total_tflops)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "this run: LISA</td>" in page
    assert f'<td class="number">{result.tflops:.3g}</td>' in page
    assert '<td>LISA-7B rec</td><td class="soft">paper</td><td class="number">7.16</td>' in page
    assert "CLIPSeg stands in its place" in page


def test_methods_are_named_as_the_paper_names_them(tmp_path: Path) -> None:
    named = {name: method_of(BASELINES[name](tmp_path / name), 3) for name in BASELINES}
    assert {name: method.name for name, method in named.items()} == {
        "pixellm": "PixelLM",
        "lisa": "LISA",
        "lisa_aug": "LISA_aug",
        "lisa_rec": "LISA_rec",
        "lisa_rec_llava": "LISA_rec",
        "clipseg": "CLIPSeg (in SEEM's place)",
        "grounded_sam2": "Grounding DINO + SAM 2",
        "sam3": "SAM 3",
    }
    cost = {name: method.tflops for name, method in named.items() if method.tflops is not None}
    assert cost["pixellm"] < cost["lisa"] < cost["lisa_aug"] < cost["lisa_rec"]
    dagger = PixelLMConfig.from_preset("tiny", tokens_per_scale=1, target_refinement_alpha=1.0)
    dagger.save_pretrained(tmp_path / "dagger")
    assert method_of(tmp_path / "dagger", 1).name == "PixelLM†"


def test_forced_answers_of_lisa_are_one_mask_or_a_mask_per_target(shards: str, tmp_path: Path) -> None:
    for variant, count in (("lisa", 1), ("lisa_aug", 2)):
        folder = write_lisa(tmp_path / variant, variant)
        options = EvaluationOptions(with_report=False, mode="forced")
        result = evaluate_suite(folder, shards, tmp_path / f"{variant}-out", "muse", options)
        assert result.metrics["mean_targets_returned"] == count


def test_a_text_prompted_model_cannot_be_given_an_answer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--mode generated"):
        ForcedAnswers(write_clipseg(tmp_path / "clipseg"))


def test_the_training_job_builds_encodes_and_writes_lisa(shards: str, tmp_path: Path) -> None:
    tree = micro_tree({"muse": shards}, tmp_path)
    tree["model"] = {"preset": "lisa-tiny"}
    settings = Settings.model_validate(tree)
    model, processor = build_model(settings), build_processor(settings)
    source = QuestionSource.open(shards, "muse", ComposeLimits(2))
    row, dialogue = source.sample(Draw(0, 0, 0, 0, 0))
    example = SampleEncoder(processor, 48)(row, dialogue, Draw(0, 0, 0, 0, 0))
    assert example.masks.shape == (1, 48, 48)
    assert example.masks[0].sum() > 1.5 * (800 / (100 * 100)) * 48**2  # the union of two targets of 800 pixels
    assert (
        processor.tokenizer.decode(example.labels[example.labels >= 0]).strip().startswith(MERGED_ANSWER.split(" {")[0])
    )
    output = model(**processor.collate([example, example]))
    output.loss.backward()
    reached = {name.split(".")[0] for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"sam_encoder", "decoder", "codebook", "language_model", "vision_tower", "image_projector"} <= reached
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    save_model_folder(model, weights, processor, tmp_path / "model")
    loaded = load_network(tmp_path / "model")
    assert type(loaded) is type(model)
    assert all(loaded.get_parameter(name).equal(value) for name, value in weights.items())


@pytest.mark.parametrize("recipe", ["lisa-7b", "lisa-tiny", "lisa-tiny-aug"])
def test_lisas_recipes_name_the_network(recipe: str) -> None:
    settings = load_settings(f"recipes/{recipe}.yaml")
    assert settings.model.preset.startswith("lisa-")
    assert settings.train.lora.enabled == (recipe == "lisa-7b")
