"""The processor: prompts, training samples, batches, answers in words, and a folder that says what it belongs to."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pixellm.errors import ConfigError, DataError, ModelLoadError
from pixellm.model.answers import AnswerReader, question_phrase, target_phrase
from pixellm.model.codebook import find_groups
from pixellm.model.config import IMAGE_TOKEN_ID, PixelLMConfig
from pixellm.model.conversation import Turn
from pixellm.model.processing import PixelLMProcessor


@pytest.fixture(scope="module")
def processor() -> PixelLMProcessor:
    return PixelLMProcessor.for_preset("tiny")


def spell(processor: PixelLMProcessor, ids: Any) -> str:
    """Ids as text, with the picture as `<image>`."""
    names = processor.tokenizer.convert_ids_to_tokens([i if i >= 0 else processor.token_ids.im_start for i in ids])
    out = "".join("<image>" if i == IMAGE_TOKEN_ID else name for i, name in zip(ids, names, strict=True))
    return out.replace("<image>" * processor.num_image_tokens, "<image>").replace("Ġ", " ")


def test_a_prompt_is_the_released_text_with_the_picture_between_its_marks(processor: PixelLMProcessor) -> None:
    ids = processor.encode_prompt("Segment the cat.")
    assert spell(processor, ids) == (
        "<s> A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER:<im_start><image><im_end> Segment the cat. "
        "ASSISTANT:"
    )
    assert ids.count(IMAGE_TOKEN_ID) == processor.num_image_tokens == 36


def test_only_answers_and_their_end_are_supervised_and_groups_are_whole(processor: PixelLMProcessor) -> None:
    ids, labels = processor.encode_dialogue([("The cat?", "It is {seg}.", 1), ("Both?", "{seg} and {seg}", 2)])
    supervised = spell(processor, [label for label in labels if label != -100])
    group = "".join(f"[SEG{i}]" for i in range(6))
    assert supervised == f" It is{group} .</s>{group} and{group}</s>"
    assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
    rows, _ = find_groups(torch.tensor([ids]), list(processor.token_ids.codebook))
    assert len(rows) == 3
    assert spell(processor, ids).endswith(f"USER: Both? ASSISTANT:{group} and{group}</s>")


def test_the_prompt_of_a_question_is_the_start_of_its_training_dialogue(processor: PixelLMProcessor) -> None:
    prompt = processor.encode_prompt([Turn("The cat?", "It is {seg}."), Turn("Both?")])
    ids, _ = processor.encode_dialogue([("The cat?", "It is {seg}.", 1), ("Both?", "{seg} and {seg}.", 2)])
    assert ids[: len(prompt)] == prompt


def test_markers_and_targets_must_agree(processor: PixelLMProcessor) -> None:
    with pytest.raises(DataError, match=r"answer 2 has 1 .seg. markers for 2 targets"):
        processor.encode_dialogue([("a", "b", 0), ("a", "{seg}", 2)])


def test_an_over_long_text_is_an_error_with_count_and_limit(processor: PixelLMProcessor) -> None:
    with pytest.raises(DataError, match=r"has \d{3,} text tokens, the limit is 512"):
        processor.encode_prompt("the cat " * 400)
    with pytest.raises(DataError, match="the limit is 512"):
        processor.encode_dialogue([("a", "{seg} " * 90, 90)])


@settings(max_examples=100, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from(["[SEG0]", "[SEG1]", "<image>", "</s>", "USER:", "{seg}", "<im_end>", " cat "]), min_size=1
    )
)
def test_user_text_never_changes_the_structure_of_a_prompt(processor: PixelLMProcessor, pieces: list[str]) -> None:
    text = "".join(pieces) + "?"
    ids = processor.encode_prompt(text)
    plain = processor.encode_prompt("cat?")
    control = {
        *processor.token_ids.codebook,
        processor.token_ids.im_start,
        processor.token_ids.im_end,
        1,
        2,
        IMAGE_TOKEN_ID,
    }
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    assert spell(processor, ids).split("<im_end>", 1)[1] == f" {text.strip()} ASSISTANT:"


def test_a_training_sample_has_uint8_pixels_and_masks_on_the_canvas(
    processor: PixelLMProcessor, demo_data: Path
) -> None:
    path = next(iter(sorted((demo_data / "images").iterdir())))
    width, height = Image.open(path).size
    mask = np.zeros((height, width), bool)
    mask[: height // 2] = True
    example = processor.encode_sample(path.read_bytes(), [("What?", "It is {seg}.", 1)], [mask], 56, "sample-1", "muse")
    assert example.pixels.dtype == np.uint8
    assert example.pixels.shape == (192, 192, 3)
    assert example.masks.shape == (1, 56, 56)
    rows = example.valid_hw[0] * 56 / 192
    assert abs(int(example.masks[0, :, 0].sum()) - rows / 2) <= 1
    copy = pickle.loads(pickle.dumps(example))
    np.testing.assert_array_equal(copy.input_ids, example.input_ids)
    assert (copy.sample_id, copy.kind) == ("sample-1", "muse")


def test_a_mask_of_another_size_or_number_is_refused_by_sample(processor: PixelLMProcessor) -> None:
    picture = Image.new("RGB", (30, 20))
    with pytest.raises(DataError, match=r"'s7'.*\(20, 31\).*\(20, 30\)"):
        processor.encode_sample(picture, [("a", "{seg}", 1)], [np.zeros((20, 31), bool)], 56, "s7")
    with pytest.raises(DataError, match="'s7' has 0 masks for 1 targets"):
        processor.encode_sample(picture, [("a", "{seg}", 1)], [], 56, "s7")


def test_collate_pads_right_with_the_pad_id_and_packs_targets(processor: PixelLMProcessor) -> None:
    picture, mask = Image.new("RGB", (30, 20), (200, 100, 50)), np.ones((20, 30), bool)
    turns = [[("a", "no", 0)], [("the cat and the dog", "{seg} and {seg}", 2)], [("b", "{seg}", 1)]]
    examples = [processor.encode_sample(picture, t, [mask] * t[0][2], 28) for t in turns]
    batch = processor.collate(examples)
    lengths = [len(example.input_ids) for example in examples]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, max(lengths))
    assert batch["attention_mask"].sum(1).tolist() == lengths
    assert (batch["input_ids"][0, lengths[0] :] == processor.tokenizer.pad_token_id).all()
    assert (batch["labels"][0, lengths[0] :] == -100).all()
    assert batch["target_rows"].tolist() == [1, 1, 2]
    assert batch["target_masks"].shape == (3, 28, 28)
    assert batch["image_index"].tolist() == [0, 1, 2]
    pixels = batch["pixel_values"]
    assert pixels.shape == (3, 3, 192, 192)
    assert pixels[:, :, 128:].abs().max() == 0
    expected = (torch.tensor([200, 100, 50]) - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor(
        [58.395, 57.12, 57.375]
    )
    torch.testing.assert_close(pixels[0, :, 0, 0], expected)


def test_without_a_mask_size_masks_stay_at_the_pictures_own_sizes(processor: PixelLMProcessor) -> None:
    sizes = [(20, 30), (50, 10)]
    examples = [
        processor.encode_sample(Image.new("RGB", size[::-1]), [("a", "{seg}", 1)], [np.ones(size, bool)], None)
        for size in sizes
    ]
    batch = processor.collate(examples)
    assert [tuple(masks.shape) for masks in batch["target_masks"]] == [(1, *size) for size in sizes]
    assert batch["original_hw"].tolist() == [list(size) for size in sizes]


def test_collate_of_nothing_is_an_error(processor: PixelLMProcessor) -> None:
    with pytest.raises(DataError, match="at least one"):
        processor.collate([])


def test_the_batch_of_the_processor_trains_the_network(micro: Any) -> None:
    model, processor = micro
    picture, mask = Image.new("RGB", (30, 20)), np.ones((20, 30), bool)
    examples = [processor.encode_sample(picture, [("a", "It is {seg}.", 1)], [mask], size) for size in (28, 28)]
    output = model(**processor.collate(examples))
    assert set(output.losses) == {"text", "ref", "dice"}
    assert output.loss.isfinite()


def test_a_saved_processor_comes_back_the_same(processor: PixelLMProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = PixelLMProcessor.from_pretrained(tmp_path)
    assert again.token_ids == processor.token_ids
    text = "the [SEG0] cat, naïve 猫"
    assert again.encode_prompt(text) == processor.encode_prompt(text)
    settings_file = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert settings_file["image_mean"] == [123.675, 116.28, 103.53]
    assert again.image_size == processor.image_size


def test_a_folder_without_or_with_a_damaged_processor_is_refused(processor: PixelLMProcessor, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="has no preprocessor_config"):
        PixelLMProcessor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(ModelLoadError):
        PixelLMProcessor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_siez": 3}')
    with pytest.raises(ModelLoadError, match="image_siez"):
        PixelLMProcessor.from_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelLoadError):
        PixelLMProcessor.from_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ModelLoadError):
        PixelLMProcessor.from_pretrained(tmp_path)


def test_a_processor_of_another_model_is_refused_with_every_difference(processor: PixelLMProcessor) -> None:
    config = PixelLMConfig.from_preset("tiny", tokens_per_scale=2, image_size=448)
    with pytest.raises(
        ModelLoadError, match=r"codebook_token_ids.*im_start_id.*image_size: tokenizer/processor 192, config 448"
    ):
        processor.check_matches(config)
    with pytest.raises(ConfigError, match="Llama tokenizer"):
        PixelLMProcessor.for_preset("pixellm-7b")


@pytest.mark.parametrize(
    ("segments", "phrase"),
    [
        (["Sure, it is "], ""),
        (["Sure, the segmentation result is "], ""),
        (["dog is "], "dog"),
        (["The cat "], "The cat"),
        (["The cat ", " is sleeping beside the laptop "], "the laptop"),
        (["You can cut the cake with a sharp knife with a black handle "], "a sharp knife with a black handle"),
        (["Take sips from the glass of pale wine on the left "], "the glass of pale wine on the left"),
        (
            ["See the cup on the end of the very old white oak table by the open door "],
            "the very old white oak table by the open door",
        ),
        (["On the left stands the man in the red shirt "], "the man in the red shirt"),
        (["The man is holding the cup "], "the cup"),
        (["There it is. Look at the dog "], "the dog"),
        (["cat is ", ", laptop is "], "laptop"),
        (["Sure, cat, dog and wine glass are "], "cat"),
        (["Sure, cat, dog and wine glass are ", ","], "dog"),
        (["Sure, cat, dog and wine glass are ", ",", "and"], "wine glass"),
        (["Sure, the three cats are ", ",", "and"], "the three cats"),
        (["The bowl ", "and", " the spoon "], "the spoon"),
        ([""], ""),
    ],
)
def test_the_words_before_a_group_name_its_target(segments: list[str], phrase: str) -> None:
    assert target_phrase(segments) == phrase


@pytest.mark.parametrize(
    ("question", "index", "phrase"),
    [
        ("Segment the cat and the laptop.", 0, "the cat"),
        ("Segment the cat and the laptop.", 1, "the laptop"),
        ("Segment the cat and the laptop.", 5, "the laptop"),
        ("Can you please segment the bowls in this image?", 0, "the bowls"),
        ("Where is the dog in the picture? Please output segmentation mask.", 0, "the dog"),
        ("Why is the sky blue?", 0, ""),
        ("", 0, ""),
    ],
)
def test_a_target_that_the_answer_does_not_name_is_named_by_the_question(
    question: str, index: int, phrase: str
) -> None:
    assert question_phrase(question, index) == phrase


def answer_ids(processor: PixelLMProcessor, answer: str) -> list[int]:
    _, labels = processor.encode_dialogue([("a", answer, answer.count("{seg}"))])
    return [label for label in labels if label != -100]


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("It is {seg}.", "It is [1]."),
        ("{seg}", "[1]"),
        ("{seg} and {seg}, not {seg}!", "[1] and [2], not [3]!"),
        ("The cat ({seg}) sleeps.", "The cat ([1]) sleeps."),
        ("A naïve 猫 {seg} here", "A naïve 猫 [1] here"),
        ("no target at all", "no target at all"),
    ],
)
def test_an_answer_reads_as_words_with_a_marker_per_group(processor: PixelLMProcessor, answer: str, text: str) -> None:
    parsed = processor.parse_answer(answer_ids(processor, answer))
    assert parsed.text == text
    assert len(parsed.phrases) == answer.count("{seg}")
    assert parsed.dropped is None


def test_broken_groups_are_dropped_and_counted_and_whole_ones_kept(processor: PixelLMProcessor) -> None:
    group = list(processor.token_ids.codebook)
    words = answer_ids(processor, "the cat")[:-1]
    parsed = processor.parse_answer([*words, *group[:4], *words, *group, group[2], *group[:2]])
    assert parsed.text == "the cat the cat [1]"
    assert parsed.dropped == "7 codebook tokens outside a complete group of 6"
    assert parsed.phrases == ("the cat",)


@settings(max_examples=60, deadline=None)
@given(ids=st.lists(st.one_of(st.integers(3, 999), st.just(-1)), max_size=60))
def test_words_streamed_piece_by_piece_are_the_words_of_the_whole(processor: PixelLMProcessor, ids: list[int]) -> None:
    reader, sections = AnswerReader(processor.tokenizer), [[]]
    deltas = []
    for token in ids:
        if token < 0:
            deltas.append(reader.add_group())
            sections.append([])
        else:
            deltas.append(reader.add_token(token))
            sections[-1].append(token)
    deltas.append(reader.finish())
    assert "".join(deltas) == reader.text
    whole = [processor.tokenizer.decode(section) for section in sections]
    squeezed = "".join(part + f"[{k + 1}]" for k, part in enumerate(whole)).removesuffix(f"[{len(whole)}]")
    assert reader.text.replace(" ", "") == squeezed.replace(" ", "")
