"""Loading is all or nothing, and each option runs the path it names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pixellm.errors import (
    ConfigError,
    ModelLoadError,
)
from pixellm.model.engine import (
    EngineOptions,
    GenerationOptions,
    PixelLMEngine,
    SchedulerLimits,
    SegmentRequest,
)
from pixellm.model.engine.options import bitsandbytes_config, check_device, load_model

QUESTION = "Segment the cat."


def start(
    engine: PixelLMEngine, picture: Any, *, listener: Any = None, timeout_s: float | None = None, **options: Any
) -> Any:
    generation = GenerationOptions(**({"max_new_tokens": 60, "temperature": 0.25, "seed": 5} | options))
    return engine.submit(SegmentRequest(picture, QUESTION, generation, timeout_s=timeout_s), listener)


@pytest.fixture(scope="module")
def folder(micro_factory: Any, tmp_path_factory: Any) -> Path:
    model, processor = micro_factory()
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def test_a_saved_folder_answers_as_the_model_in_memory(folder: Path, pictures: Any, micro_factory: Any) -> None:
    model, processor = micro_factory()
    model.lean.zero_()
    with PixelLMEngine.from_pretrained(folder) as loaded, PixelLMEngine(model, processor) as engine:
        assert loaded.options.limits.max_batch_size == 8
        one, other = (start(e, pictures[0], max_new_tokens=12).result() for e in (loaded, engine))
    assert one.token_ids == other.token_ids


def test_weights_that_are_missing_or_mis_shaped_are_refused(folder: Path, tmp_path: Path) -> None:
    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    weights = load_file(folder / "model.safetensors")
    victim = next(name for name in weights if name.startswith("decoder."))
    save_file({k: v for k, v in weights.items() if k != victim}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelLoadError, match=victim.replace(".", r"\.")):
        PixelLMEngine.from_pretrained(tmp_path)
    save_file(
        weights | {victim: weights[victim][..., :1].contiguous()}, tmp_path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelLoadError):
        PixelLMEngine.from_pretrained(tmp_path)
    with pytest.raises(ModelLoadError):
        PixelLMEngine.from_pretrained(tmp_path / "nowhere")


def test_a_tokenizer_with_other_codebook_ids_is_refused(folder: Path, tmp_path: Path) -> None:
    for name in folder.iterdir():
        (tmp_path / name.name).write_bytes(name.read_bytes())
    text = (tmp_path / "tokenizer.json").read_text()
    swapped = text.replace('"[SEG1]"', '"[X]"').replace('"[SEG0]"', '"[SEG1]"').replace('"[X]"', '"[SEG0]"')
    (tmp_path / "tokenizer.json").write_text(swapped)
    with pytest.raises(ModelLoadError, match="codebook_token_ids: tokenizer/processor"):
        PixelLMEngine.from_pretrained(tmp_path)


def test_dtype_and_attention_are_those_that_were_asked_for(folder: Path, pictures: Any) -> None:
    model = load_model(folder, "cpu", EngineOptions(dtype="bf16", attention="eager"))
    assert model.dtype == torch.bfloat16
    assert model.language_model.config._attn_implementation == "eager"
    with PixelLMEngine.from_pretrained(folder, options=EngineOptions(dtype="bf16")) as engine:
        assert start(engine, pictures[0], max_new_tokens=8).result().stop_reason


def test_eager_attention_answers_as_sdpa_does(folder: Path, pictures: Any) -> None:
    answers = []
    for attention in ("sdpa", "eager"):
        with PixelLMEngine.from_pretrained(folder, options=EngineOptions(attention=attention)) as engine:
            assert engine.model.language_model.config._attn_implementation == attention
            answers.append([start(engine, picture, max_new_tokens=12).result().token_ids for picture in pictures])
    assert answers[0] == answers[1]


def test_a_kernel_that_takes_only_key_masks_answers_the_same(micro: Any, pictures: Any) -> None:
    """The path of flash attention: two-dimensional masks, groups row by row; SDPA reads them too."""
    answers = []
    for form in ("bool", "keys"):
        with PixelLMEngine(*micro, max_batch_size=4) as engine:
            engine._loop._runner._mask_form = form
            handles = [start(engine, picture) for picture in pictures]
            answers.append([handle.result(60).token_ids for handle in handles])
    assert answers[0] == answers[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp8"}, "choose one of fp32, bf16, fp16"),
        ({"attention": "ring"}, "choose one of sdpa"),
        ({"quantization": "3bit"}, "choose one of None, 8bit"),
        ({"max_batch_targets": 0}, "max_batch_targets"),
    ],
)
def test_unknown_options_are_refused_with_the_choices(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions(**options)


def test_flash_attention_and_bitsandbytes_say_what_they_need(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="needs a CUDA device"):
        load_model(folder, "cpu", EngineOptions(attention="flash_attention_2"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="flash-attn"):
        load_model(folder, "cuda", EngineOptions(attention="flash_attention_2"))
    with pytest.raises(ConfigError, match="pip install bitsandbytes"):
        load_model(folder, "cpu", EngineOptions(quantization="4bit"))


def test_bitsandbytes_quantizes_the_language_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    eight = bitsandbytes_config(EngineOptions(quantization="8bit"))
    four = bitsandbytes_config(EngineOptions(quantization="4bit", dtype="bf16"))
    assert (eight.load_in_8bit, eight.load_in_4bit) == (True, False)
    assert (four.load_in_4bit, four.bnb_4bit_compute_dtype) == (True, torch.bfloat16)
    assert "language_model" not in eight.llm_int8_skip_modules
    assert {"decoder", "codebook", "vision_tower", "lm_head"} <= set(eight.llm_int8_skip_modules)


def test_int8_on_the_cpu_replaces_the_language_models_layers_and_answers(folder: Path, pictures: Any) -> None:
    with PixelLMEngine.from_pretrained(folder, options=EngineOptions(quantization="int8-cpu")) as engine:
        assert not [m for m in engine.model.language_model.modules() if type(m) is torch.nn.Linear]
        assert [m for m in engine.model.decoder.modules() if type(m) is torch.nn.Linear]
        assert start(engine, pictures[0], max_new_tokens=8).result().stop_reason


def test_the_compiled_step_is_used_and_answers_the_same(
    micro: Any, pictures: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[dict[str, Any]] = []

    def fake_compile(function: Any, **options: Any) -> Any:
        compiled.append(options)
        return function

    monkeypatch.setattr(torch, "compile", fake_compile)
    options = EngineOptions(compile_decode=True, limits=SchedulerLimits(max_batch_size=3), max_context_tokens=300)
    with PixelLMEngine(*micro, options=options) as engine, PixelLMEngine(*micro) as plain:
        assert compiled == [{"mode": "default", "dynamic": False}]
        assert engine._loop._runner.cache.capacity >= 300
        handles = [start(engine, picture, max_new_tokens=30) for picture in pictures]
        expected = [start(plain, picture, max_new_tokens=30).result() for picture in pictures]
        assert [h.result(60).token_ids for h in handles] == [e.token_ids for e in expected]


@pytest.mark.parametrize("device", ["gpu", "cuda:99"])
def test_a_device_that_is_not_here_is_named(device: str) -> None:
    with pytest.raises(ConfigError, match=f"cannot run on device '{device}'"):
        check_device(device)
    check_device("cpu")
