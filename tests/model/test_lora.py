"""LoRA: only in the language model, trained alone, and the same network before and after merging."""

from pathlib import Path

import pytest
import torch
from micro import micro_batch, micro_model

from pixellm.errors import ConfigError, ModelLoadError
from pixellm.model.lora import attach_lora, load_adapter, merge_lora, merge_state_dict, save_adapter
from pixellm.model.modeling import PixelLMForConditionalGeneration


def trained_model() -> PixelLMForConditionalGeneration:
    """A model whose adapter has moved away from zero, in evaluation mode."""
    model = attach_lora(micro_model(), r=3, alpha=7.5, dropout=0.3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
    return model.eval()


def logits(model: PixelLMForConditionalGeneration) -> torch.Tensor:
    with torch.no_grad():
        return model(**micro_batch(model.config)).logits


def test_a_fresh_adapter_changes_nothing() -> None:
    model = micro_model().eval()
    before = logits(model)
    torch.testing.assert_close(logits(attach_lora(model)), before)
    assert not model.language_model.layers[0].self_attn.q_proj.training


def test_it_sits_in_the_language_model_alone_and_freezes_what_it_stands_on() -> None:
    model = attach_lora(micro_model(), target_modules=("q_proj", "v_proj", "up_proj"))
    names = [name for name, _ in model.named_parameters() if ".lora_" in name]
    assert len(names) == 2 * 3 * 2
    assert all(name.startswith("language_model.") for name in names)
    by_part: dict[str, set[bool]] = {}
    for name, parameter in model.named_parameters():
        by_part.setdefault(model.part_of(name), set()).add(parameter.requires_grad)
    assert by_part["lora"] == {True}
    assert by_part["language"] == {False}
    assert by_part["embeddings"] == by_part["codebook"] == by_part["projectors"] == {True}


def test_training_moves_the_adapter_and_not_what_it_stands_on() -> None:
    model = attach_lora(micro_model(), dropout=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(**micro_batch(model.config)).loss.backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        if model.part_of(name) == "language" or ".lora_A." in name:  # A moves once B is no longer zero
            assert torch.equal(parameter, before[name]), name
        elif ".lora_B." in name:
            assert not torch.equal(parameter, before[name]), name


def test_merged_logits_are_the_unmerged_ones() -> None:
    model = trained_model()
    wanted = logits(model)
    assert not torch.allclose(wanted, logits(micro_model().eval()), atol=1e-2)
    merged = merge_lora(model)
    torch.testing.assert_close(logits(merged), wanted, rtol=0, atol=1e-5)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in micro_model().named_parameters()]
    attach_lora(merged)  # and a new adapter may follow


def test_saving_writes_a_merged_model_and_leaves_the_adapter_on(tmp_path: Path) -> None:
    model = trained_model()
    model.save_pretrained(tmp_path)
    exported = PixelLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(exported), logits(model), rtol=0, atol=1e-5)
    assert any(".lora_A." in name for name, _ in model.named_parameters())


def test_merging_a_state_dict_is_w_plus_scaled_b_a() -> None:
    a, b, w = torch.randn(2, 5), torch.randn(4, 2), torch.randn(4, 5)
    state = {
        "x.q.base_layer.weight": w,
        "x.q.lora_A.default.weight": a,
        "x.q.lora_B.default.weight": b,
        "x.k.weight": w,
    }
    merged = merge_state_dict(state, 2.5)
    assert set(merged) == {"x.q.weight", "x.k.weight"}
    torch.testing.assert_close(merged["x.q.weight"], w + 2.5 * b @ a)
    assert merged["x.k.weight"] is w


def test_the_adapter_alone_is_small_and_restores_the_model(tmp_path: Path) -> None:
    model = trained_model()
    save_adapter(model, tmp_path)
    count = sum(p.numel() for n, p in model.named_parameters() if ".lora_" in n)
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * count + 4096
    restored = load_adapter(micro_model(), tmp_path).eval()
    assert torch.equal(logits(restored), logits(model))


def test_peft_reads_the_adapter(tmp_path: Path) -> None:
    from peft import PeftModel

    model = trained_model()
    save_adapter(model, tmp_path)
    wrapped = PeftModel.from_pretrained(micro_model().eval(), str(tmp_path))
    assert torch.equal(logits(wrapped.base_model.model.eval()), logits(model))


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    save_adapter(trained_model(), tmp_path)
    with pytest.raises(ModelLoadError, match=r"layers\.2"):
        load_adapter(micro_model(text_config={"num_hidden_layers": 3}), tmp_path)
    with pytest.raises(ModelLoadError, match="no adapter"):
        load_adapter(micro_model(), tmp_path / "nowhere")


def test_wrong_uses_say_what_to_do() -> None:
    with pytest.raises(ConfigError, match="merge_lora"):
        attach_lora(attach_lora(micro_model()))
    with pytest.raises(ConfigError, match="could not be attached"):
        attach_lora(micro_model(), target_modules=("no_such_layer",))
    with pytest.raises(ConfigError, match="attach_lora"):
        save_adapter(micro_model(), "unused")
