"""The whole network: every option runs and trains, batches change nothing, saved is loaded bit for bit."""

import itertools
from pathlib import Path

import pytest
import torch
from micro import micro_batch, micro_config, micro_model

from pixellm.errors import DataError
from pixellm.model.modeling import PixelLMForConditionalGeneration


@pytest.mark.parametrize(("tokens_per_scale", "num_scales"), itertools.product((1, 2, 3, 4), (1, 2, 3)))
def test_every_codebook_size_trains(tokens_per_scale: int, num_scales: int) -> None:
    model = micro_model(tokens_per_scale=tokens_per_scale, num_scales=num_scales)
    output = model(**micro_batch(model.config))
    side = 16 if num_scales == 1 else 32
    assert output.mask_logits.shape == (5, side, side)
    assert output.embeds_MGC.shape == (5, num_scales, 32)
    assert output.logits.shape[::2] == (3, 61)
    output.loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    "option",
    [
        {"token_fusion": "mean", "target_refinement_alpha": 1.0},  # PixelLM†
        {"scale_fusion": "mean"},
        {"projector_type": "linear"},
        {"freeze_neck": True},
        {"position_resize": "released"},
    ],
)
def test_every_option_trains_and_survives_saving(tmp_path: Path, option: dict) -> None:
    model = micro_model(**option)
    batch = micro_batch(model.config)
    output = model(**batch)
    output.loss.backward()
    neck_trains = any(p.grad is not None for n, p in model.named_parameters() if model.part_of(n) == "neck")
    assert neck_trains != option.get("freeze_neck", False)
    model.save_pretrained(tmp_path)
    loaded = PixelLMForConditionalGeneration.from_pretrained(tmp_path)
    assert {key: getattr(loaded.config, key) for key in option} == option
    assert torch.equal(loaded.eval()(**batch).mask_logits, model.eval()(**batch).mask_logits)


def test_the_loss_is_the_weighted_sum_of_its_parts() -> None:
    model = micro_model(text_loss_weight=0.7, ref_loss_weight=3.0, dice_loss_weight=0.2)
    batch = micro_batch(model.config)
    output = model(**batch)
    assert set(output.losses) == {"text", "ref", "dice"}
    torch.testing.assert_close(output.loss, sum(output.losses.values()))
    unit = micro_model(text_loss_weight=1.0, ref_loss_weight=1.0, dice_loss_weight=1.0)(**batch)
    for name, weight in (("text", 0.7), ("ref", 3.0), ("dice", 0.2)):
        torch.testing.assert_close(output.losses[name], weight * unit.losses[name])


def test_training_lowers_every_loss() -> None:
    model = micro_model()
    batch = micro_batch(model.config)
    batch["target_masks"].zero_()[:, :, :9] = 1
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0)
    history = []
    for _ in range(30):
        output = model(**batch)
        history.append(output.losses)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert all(history[-1][name] < 0.7 * history[0][name] for name in history[0])


def test_a_row_is_the_same_alone_and_in_a_batch() -> None:
    model = micro_model().eval()
    batch = micro_batch(model.config)
    with torch.no_grad():
        together = model(**batch)
        for row, (targets, picture) in enumerate(((slice(0, 2), 1), (slice(2, 2), 0), (slice(2, 5), 0))):
            length = int(batch["attention_mask"][row].sum())
            alone = model(
                input_ids=batch["input_ids"][row : row + 1, :length],
                attention_mask=batch["attention_mask"][row : row + 1, :length],
                pixel_values=batch["pixel_values"][picture : picture + 1],
                image_valid_hw=batch["image_valid_hw"][picture : picture + 1],
                image_index=torch.tensor([0]),
            )
            torch.testing.assert_close(alone.logits[0], together.logits[row, :length], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(alone.mask_logits, together.mask_logits[targets], rtol=1e-4, atol=1e-4)


def test_many_targets_without_gradients_are_decoded_in_batches_with_equal_results() -> None:
    model = micro_model().eval()
    embeds, scales = torch.randn(37, 2, 32), torch.randn(3, 2, 32, 8, 8)
    images = torch.arange(37) % 3
    sizes = []
    model.decoder.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    at_once = model.decode_masks(embeds, scales, images).detach()
    with torch.no_grad():
        in_batches = model.decode_masks(embeds, scales, images)
    assert sizes == [37, 16, 16, 5]
    torch.testing.assert_close(in_batches, at_once, rtol=1e-4, atol=1e-4)


def test_targets_may_come_in_any_order_of_rows() -> None:
    model = micro_model()
    batch = micro_batch(model.config)
    order = torch.tensor([2, 0, 3, 1, 4])  # appearance within each row is kept
    shuffled = batch | {"target_rows": batch["target_rows"][order], "target_masks": batch["target_masks"][order]}
    plain, other = model(**batch), model(**shuffled)
    torch.testing.assert_close(other.mask_logits, plain.mask_logits[order])
    torch.testing.assert_close(other.loss, plain.loss)
    assert other.target_rows.tolist() == [2, 0, 2, 0, 2]


@pytest.mark.parametrize(("rows", "row", "groups", "targets"), [([0, 2, 2, 2], 0, 2, 1), ([0, 0, 1, 2, 2], 1, 0, 1)])
def test_groups_and_targets_must_agree_in_every_row(rows: list[int], row: int, groups: int, targets: int) -> None:
    model = micro_model()
    batch = micro_batch(model.config) | {
        "target_rows": torch.tensor(rows),
        "target_masks": torch.zeros(len(rows), 8, 8),
    }
    with pytest.raises(DataError, match=f"row {row} has {groups} codebook groups and {targets} targets"):
        model(**batch)


def test_a_row_beyond_the_batch_is_refused() -> None:
    model = micro_model()
    batch = micro_batch(model.config) | {"target_rows": torch.tensor([0, 0, 2, 2, 2, 7])}
    with pytest.raises(DataError, match="row 7 has 0 codebook groups and 1 targets"):
        model(**batch)


def test_a_picture_takes_all_its_positions_or_none() -> None:
    model = micro_model()
    batch = micro_batch(model.config)
    batch["input_ids"][1, 4] = 9
    with pytest.raises(DataError, match="row 1 has 8 image positions; a picture takes 9"):
        model(**batch)


def test_a_batch_without_targets_reaches_every_weight_with_zero_gradient() -> None:
    model = micro_model()
    batch = micro_batch(model.config, (0, 0))
    output = model(**batch)
    assert output.mask_logits.shape == (0, 32, 32)
    torch.testing.assert_close(output.loss, output.losses["text"] + output.losses["ref"] + output.losses["dice"])
    output.loss.backward()
    for name, parameter in model.named_parameters():
        if model.part_of(name) in ("codebook", "decoder", "neck") and parameter.requires_grad:
            assert parameter.grad is not None, name
            assert not parameter.grad.any(), name


def test_a_cache_changes_no_hidden_state() -> None:
    model = micro_model().eval()
    batch = micro_batch(model.config)
    with torch.no_grad():
        features = model.encode_images(batch["pixel_values"], batch["image_valid_hw"])
        embeds, mask = model.embed_inputs(batch["input_ids"], features, batch["image_index"], batch["attention_mask"])
        positions = torch.arange(embeds.shape[1])[None]
        whole, nothing = model.language_forward(embeds, mask, positions)
        cache, parts = None, []
        for start, stop in ((0, 14), (14, 15), (15, 22), (22, embeds.shape[1])):
            hidden, cache = model.language_forward(
                embeds[:, start:stop], mask[:, :stop], positions[:, start:stop], cache, use_cache=True
            )
            parts.append(hidden)
    assert nothing is None
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(torch.cat(parts, 1)[real], whole[real], rtol=1e-5, atol=1e-5)


def test_nobody_attends_to_picture_tokens_on_padding() -> None:
    model = micro_model().eval()
    batch = micro_batch(model.config)
    with torch.no_grad():
        features = model.encode_images(batch["pixel_values"], batch["image_valid_hw"])
        noisy = features.image_tokens + 5 * (~features.token_valid)[..., None]
        hidden = []
        for tokens in (features.image_tokens, noisy):
            features.image_tokens = tokens
            embeds, mask = model.embed_inputs(
                batch["input_ids"], features, batch["image_index"], batch["attention_mask"]
            )
            hidden.append(model.language_forward(embeds, mask, torch.arange(embeds.shape[1])[None])[0])
    assert not features.token_valid.all()
    torch.testing.assert_close(hidden[0][mask], hidden[1][mask])


def test_training_leaves_out_what_nobody_attends_to_and_learns_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model = micro_model()
    batch = micro_batch(model.config)
    batch["image_valid_hw"][:, 0] = model.config.image_size // 2
    learned, seen = [], []
    original = model.language_forward

    def language_forward(embeds: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> tuple:
        seen.append((mask, positions))
        return original(embeds, mask, positions)

    monkeypatch.setattr(model, "language_forward", language_forward)
    for is_training in (True, False):
        output = model.train(is_training)(**batch)
        output.loss.backward()
        learned.append((output.losses, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
        model.zero_grad()
    (short_mask, short_positions), (whole_mask, _) = seen
    assert short_mask.shape[1] == whole_mask.sum(1).max() < whole_mask.shape[1]
    for row in range(len(whole_mask)):
        assert torch.equal(short_positions[row][short_mask[row]], whole_mask[row].nonzero().flatten())
    torch.testing.assert_close(learned[0][0], learned[1][0], rtol=1e-5, atol=1e-6)
    assert learned[0][1].keys() == learned[1][1].keys()
    for name, gradient in learned[1][1].items():
        torch.testing.assert_close(learned[0][1][name], gradient, rtol=1e-4, atol=1e-6)


def test_pictures_stand_where_the_ids_say_and_words_around_them() -> None:
    model = micro_model().eval()
    batch = micro_batch(model.config)
    features = model.encode_images(batch["pixel_values"], batch["image_valid_hw"])
    embeds, mask = model.embed_inputs(batch["input_ids"], features, batch["image_index"])
    torch.testing.assert_close(embeds[0, 3:12], features.image_tokens[1])
    torch.testing.assert_close(embeds[2, 3:12], features.image_tokens[0])
    torch.testing.assert_close(embeds[:, 12:], model.get_input_embeddings()(batch["input_ids"][:, 12:]))
    assert mask[:, 12:].all()
    torch.testing.assert_close(mask[1, 3:12], features.token_valid[0])


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for is_checkpointed in (False, True):
        model = micro_model()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model(**micro_batch(model.config)).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_half_precision_trains_and_keeps_mask_logits_in_full() -> None:
    batch = micro_batch(micro_config())
    full = micro_model()(**batch)
    model = micro_model().to(torch.bfloat16)
    half = model(**batch)
    half.loss.backward()
    assert half.mask_logits.dtype == torch.float32
    assert all(p.grad.dtype == torch.bfloat16 for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(half.loss.float(), full.loss, rtol=0.05, atol=0.05)


def test_saved_and_loaded_is_bit_equal(tmp_path: Path) -> None:
    model = micro_model().eval()
    model.save_pretrained(tmp_path)
    loaded = PixelLMForConditionalGeneration.from_pretrained(tmp_path).eval()
    saved, got = model.state_dict(), loaded.state_dict()
    assert saved.keys() == got.keys()
    trainable = [{n for n, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)]
    assert trainable[0] == trainable[1] != saved.keys()
    assert all(torch.equal(saved[key], got[key]) for key in saved)
    batch = micro_batch(model.config)
    assert torch.equal(model(**batch).logits, loaded(**batch).logits)
    mine, theirs = model.config.to_dict(), loaded.config.to_dict()
    for part in (
        mine,
        theirs,
        mine["text_config"],
        theirs["text_config"],
        mine["vision_config"],
        theirs["vision_config"],
    ):
        for volatile in ("dtype", "_name_or_path", "architectures", "transformers_version"):
            part.pop(volatile, None)
    assert mine == theirs


def test_a_frozen_part_stays_frozen_and_unreached_weights_never_train() -> None:
    model = micro_model()
    model.set_trainable_parts({"decoder", "embeddings"})
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {model.part_of(name) for name in trainable} == {"decoder", "embeddings"}
    assert not any("iou_head" in name for name in trainable)


def test_the_same_seed_draws_the_same_network() -> None:
    first, second = micro_model(seed=5).state_dict(), micro_model(seed=5).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_new_parts_and_decoder_tokens_are_drawn_as_the_config_says() -> None:
    def spread(**options: object) -> tuple[float, float]:
        decoder = micro_model(decoder_hidden_size=64, decoder_num_heads=4, **options).decoder
        return decoder.mask_head.layers[0].weight.std().item(), decoder.mask_tokens.weight.std().item()

    # torch draws from U(±1/√64), Xavier from U(±√(6/128))
    assert spread() == (pytest.approx(1 / 8 / 3**0.5, rel=0.05), pytest.approx(1.0, rel=0.2))
    drawn = spread(new_parts_initializer="xavier", decoder_token_range=0.1)
    assert drawn == (pytest.approx((6 / 128) ** 0.5 / 3**0.5, rel=0.05), pytest.approx(0.1, rel=0.2))


def test_towers_are_drawn_with_the_configs_std() -> None:
    model = micro_model(text_config={"hidden_size": 96}, initializer_range=0.06, embedding_initializer_range=0.3)
    assert model.language_model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.06, rel=0.05)
    assert model.vision_tower.encoder.layers[0].mlp.fc1.weight.std().item() == pytest.approx(0.06, rel=0.15)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.3, rel=0.05)
    default = PixelLMForConditionalGeneration(
        micro_config(text_config={"hidden_size": 96}, initializer_range=None, embedding_initializer_range=None)
    )
    assert default.language_model.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert default.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.05)
