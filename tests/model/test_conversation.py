"""The released conversation text, and user words that can never become control tokens."""

import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from pixellm.errors import ConfigError, DataError, ModelLoadError
from pixellm.model.answers import AnswerReader
from pixellm.model.conversation import SectionKind, Turn, conversation_sections, history_turns
from pixellm.model.tokenization import (
    PlainTextEncoder,
    add_codebook_tokens,
    codebook_token_names,
    find_codebook_tokens,
    load_tiny_tokenizer,
)

CONTROL_WORDS = [
    "[SEG0]",
    "[SEG5]",
    "[SEG]",
    "<image>",
    "</s>",
    "<s>",
    "<unk>",
    "<im_start>",
    "<im_end>",
    "USER:",
    "{seg}",
]


def llama_like_tokenizer() -> PreTrainedTokenizerFast:
    """SentencePiece's manner, as Llama's: a prefix space as `▁`, byte fallback, and `</s>` reachable by merges."""
    letters = ["▁", *string.printable.strip(), "é"]
    pieces = ["<unk>", "<s>", "</s>", *[f"<0x{i:02X}>" for i in range(256)], *letters, "</", "s>", "▁t", "he", "▁the"]
    merges = [("<", "/"), ("s", ">"), ("</", "s>"), ("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="module", params=["tiny", "llama"])
def tokenizer(request: Any) -> PreTrainedTokenizerFast:
    loaded = load_tiny_tokenizer() if request.param == "tiny" else llama_like_tokenizer()
    add_codebook_tokens(loaded, 3, 2)
    return loaded


def test_the_text_is_the_released_one() -> None:
    sections = conversation_sections([Turn("Segment the cat.", "It is {seg}."), Turn("And the dog?")])
    shown = {SectionKind.START: "<s>", SectionKind.PICTURE: "<im_start><image><im_end>", SectionKind.END: "</s>"}
    text = " ".join(shown.get(s.kind, s.text or "[SEG…]") for s in sections)
    assert text == (
        "<s> A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <im_start><image><im_end> Segment the cat. "
        "ASSISTANT: It is [SEG…] . </s> USER: And the dog? ASSISTANT:"
    )
    assert [s.is_supervised for s in sections] == [False] * 4 + [True] * 4 + [False]


@pytest.mark.parametrize("question", ["", "  ", "\n\t"])
def test_an_empty_question_is_refused(question: str) -> None:
    with pytest.raises(DataError, match="question 1 of 1 is empty"):
        conversation_sections([Turn(question)])


def test_a_conversation_needs_a_question_and_answers_before_the_last() -> None:
    with pytest.raises(DataError, match="no question"):
        conversation_sections([])
    with pytest.raises(DataError, match="turn 1 of 2 has no answer"):
        conversation_sections([Turn("a"), Turn("b")])


def test_markers_of_earlier_answers_become_groups_again_and_other_brackets_stay_words() -> None:
    turns = history_turns([("Cats?", "The cat [1] and [3] and the dog [2]; {seg} [1].")])
    assert turns == [Turn("Cats?", "The cat {seg} and [3] and the dog {seg}; { seg } [1].")]


@pytest.mark.parametrize(("tokens_per_scale", "num_scales"), [(1, 1), (1, 2), (3, 2), (4, 3)])
def test_codebook_ids_are_found_by_name_and_survive_saving(
    tokens_per_scale: int, num_scales: int, tmp_path: Any
) -> None:
    tokenizer = load_tiny_tokenizer()
    base = len(tokenizer)
    ids = add_codebook_tokens(tokenizer, tokens_per_scale, num_scales)
    names = codebook_token_names(tokens_per_scale, num_scales)
    count = tokens_per_scale * num_scales
    assert names == (["[SEG]"] if count == 1 else [f"[SEG{i}]" for i in range(count)])
    assert ids.codebook == tuple(range(base, base + count))
    assert (ids.im_start, ids.im_end, ids.vocab_size) == (base + count, base + count + 1, base + count + 2)
    assert add_codebook_tokens(tokenizer, tokens_per_scale, num_scales) == ids
    assert tokenizer.pad_token_id == tokenizer.unk_token_id == 0
    tokenizer.save_pretrained(tmp_path)
    assert find_codebook_tokens(PreTrainedTokenizerFast.from_pretrained(tmp_path), tokens_per_scale, num_scales) == ids


def test_a_tokenizer_without_the_tokens_is_refused_by_name() -> None:
    with pytest.raises(ModelLoadError, match=r"\[SEG0\], \[SEG1\]"):
        find_codebook_tokens(load_tiny_tokenizer(), 1, 2)
    with pytest.raises(ConfigError, match="tokens_per_scale=0"):
        codebook_token_names(0, 2)


@pytest.mark.parametrize("word", CONTROL_WORDS)
def test_a_control_word_typed_by_a_user_stays_a_word(tokenizer: PreTrainedTokenizerFast, word: str) -> None:
    encoder = PlainTextEncoder(tokenizer)
    ids = encoder.encode(f"say {word} twice: {word}{word}")
    assert not set(ids) & encoder.control_ids
    assert tokenizer.decode(ids).strip() == f"say {word} twice: {word}{word}"


@settings(max_examples=150, deadline=None)
@given(pieces=st.lists(st.one_of(st.sampled_from(CONTROL_WORDS), st.text(max_size=8)), max_size=8))
def test_no_text_makes_a_control_token(tokenizer: PreTrainedTokenizerFast, pieces: list[str]) -> None:
    encoder = PlainTextEncoder(tokenizer)
    ids = encoder.encode("".join(pieces))
    assert not set(ids) & encoder.control_ids
    assert all(0 <= i < len(tokenizer) for i in ids)


def test_plain_words_are_encoded_as_the_tokenizer_does(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "the cat on the table, 12 times"
    assert PlainTextEncoder(tokenizer).encode(text) == tokenizer(text, add_special_tokens=False).input_ids


@settings(max_examples=60, deadline=None)
@given(sections=st.lists(st.text("the cat é猫.,", min_size=1, max_size=20), min_size=1, max_size=4))
def test_words_streamed_piece_by_piece_are_the_words_that_were_encoded(
    tokenizer: PreTrainedTokenizerFast, sections: list[str]
) -> None:
    encoder, reader = PlainTextEncoder(tokenizer), AnswerReader(tokenizer)
    sections = [" ".join(section.split()) for section in sections]
    streamed = ""
    for place, section in enumerate(sections):
        streamed += reader.add_group() if place else ""
        for token in encoder.encode(section):
            streamed += reader.add_token(token)
    streamed += reader.finish()
    assert streamed == reader.text
    marked = "".join(f"[{place}]{section}" if place else section for place, section in enumerate(sections))
    assert streamed.replace(" ", "") == marked.replace(" ", "")
    assert streamed.split("[")[0].rstrip() == sections[0]


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        unk_token_id = 0

    with pytest.raises(ModelLoadError, match="Slow has no fast tokenizer"):
        PlainTextEncoder(Slow())  # type: ignore[arg-type]
