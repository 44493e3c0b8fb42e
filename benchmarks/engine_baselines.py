"""What the engine is compared with: the released algorithm, transformers' `generate`, static batches, single tokens.

All sides use the same network, picture, question and greedy choice, and must give the same ids. The network is
untrained, so its head is solved for in closed form such that greedy decoding gives the written answers: costs are those
of a trained network of the same sizes, and every side has the same words and targets to produce.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from pixellm.model.backbone import ImageFeatures
from pixellm.model.codebook import find_groups, gather_groups
from pixellm.model.engine.kv_cache import SlotCache
from pixellm.model.engine.picture_cache import PictureCache, picture_digest
from pixellm.model.engine.runner import Row, Runner
from pixellm.model.engine.targets import finish_targets
from pixellm.model.engine.types import GenerationOptions, TargetMask
from pixellm.model.images import PreparedImage
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.processing import PixelLMProcessor


@dataclass(frozen=True)
class Case:
    """One network with one picture.

    Attributes:
        model: in evaluation mode, fp32.
        processor: its processor.
        picture: square, so that no position is masked and `generate`'s own positions agree.
    """

    model: PixelLMForConditionalGeneration
    processor: PixelLMProcessor
    picture: PreparedImage

    def pixel_values(self) -> tuple[Tensor, Tensor]:
        """The network's input [1, 3, S, S] and valid sizes [1, 2]."""
        valid = torch.tensor([self.picture.valid_hw])
        return self.processor.normalise(torch.from_numpy(self.picture.pixels)[None], valid), valid


@torch.inference_mode()
def write_answers(case: Case, dialogues: Sequence[tuple[str, str]]) -> None:
    """Solves for the head with which greedy decoding answers each question as written.

    Args:
        case: the head of its model is replaced.
        dialogues: (question, answer with `{seg}` markers); together fewer supervised tokens than the model is wide.
    """
    model, states, wanted = case.model, [], []
    features = model.encode_images(*case.pixel_values())
    for question, answer in dialogues:
        ids, labels = case.processor.encode_dialogue([(question, answer, answer.count("{seg}"))])
        hidden = _hidden(model, features, torch.tensor([ids]))[0]
        places = [i for i, label in enumerate(labels) if label >= 0]
        states.append(hidden[[i - 1 for i in places]])
        wanted += [labels[i] for i in places]
    matrix = torch.cat(states).double()
    targets = torch.zeros(len(wanted), model.config.text_config.vocab_size, dtype=torch.float64)
    targets[range(len(wanted)), wanted] = 10.0
    solution = torch.linalg.pinv(matrix) @ targets
    model.lm_head.weight.copy_(solution.T.float())


@torch.inference_mode()
def answer_as_released(case: Case, question: str, max_new_tokens: int) -> tuple[list[int], list[TargetMask]]:
    """The released algorithm: for every token, CLIP and the whole sequence again; masks from the last pass."""
    model, eos = case.model, case.processor.tokenizer.eos_token_id
    prompt = case.processor.encode_prompt(question)
    answer: list[int] = []
    pixel_values, valid = case.pixel_values()
    while True:
        features = model.encode_images(pixel_values, valid)
        hidden = _hidden(model, features, torch.tensor([prompt + answer]))
        token = int(model.lm_logits(hidden)[0, -1].argmax())
        if token == eos or len(answer) >= max_new_tokens:
            return answer, _masks(case, features, hidden, prompt + answer)
        answer.append(token)


@torch.inference_mode()
def answer_with_generate(
    case: Case, question: str, max_new_tokens: int, *, second_vision_pass: bool = False
) -> tuple[list[int], list[TargetMask]]:
    """transformers' `generate` with its cache, then a second pass over the whole sequence for hidden states.

    The second pass gets the first one's picture features, which only hand-written code can do; with
    `second_vision_pass` it looks at the picture again, as a call of the model's own `forward` does.
    """
    model = case.model
    with torch.device("meta"):
        causal = LlamaForCausalLM(model.config.text_config)
    causal.model, causal.lm_head = model.language_model, model.lm_head
    prompt = case.processor.encode_prompt(question)
    features = model.encode_images(*case.pixel_values())
    embeds, mask = model.embed_inputs(torch.tensor([prompt]), features, torch.zeros(1, dtype=torch.long))
    generated = (
        causal.eval()
        .generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=case.processor.tokenizer.eos_token_id,
            pad_token_id=case.processor.tokenizer.pad_token_id,
        )[0]
        .tolist()
    )
    answer = [token for token in generated if token != case.processor.tokenizer.eos_token_id]
    if second_vision_pass:
        features = model.encode_images(*case.pixel_values())
    hidden = _hidden(model, features, torch.tensor([prompt + answer]))
    return answer, _masks(case, features, hidden, prompt + answer)


class BareRunner:
    """The engine's own forwards without its scheduler: rows that are driven by hand."""

    def __init__(self, case: Case, num_rows: int) -> None:
        self.case = case
        self.runner = Runner(
            case.model,
            case.model.get_input_embeddings(),
            SlotCache(num_rows, case.model.config.text_config.max_position_embeddings, torch.device("cpu")),
            PictureCache(2**30),
            mask_form="bool",
            reuse_prefix=True,
        )

    @torch.inference_mode()
    def start(self, questions: Sequence[str]) -> list[Row]:
        """Prefills one row per question."""
        rows = []
        for question in questions:
            ids, token = self.case.processor.encode_prompt(question), self.case.model.config.image_token_id
            row = Row(ids, picture_digest(self.case.picture), ids.index(token), ids.count(token))
            self.runner.look_at([row], [self.case.picture], self.case.processor.normalise)
            self.runner.admit(row)
            self.runner.prefill(row, row.prompt_left)
            rows.append(row)
        return rows

    @torch.inference_mode()
    def run_tokens(self, rows: Sequence[Row], count: int) -> None:
        """Generates `count` tokens for every row and takes them back."""
        lengths = [row.length for row in rows]
        for _ in range(count):
            self.runner.decode_tokens(rows, self.runner.logits(rows).argmax(-1).tolist(), [])
        for row, length in zip(rows, lengths, strict=True):
            row.length = length

    def release(self, rows: Sequence[Row]) -> None:
        """Gives the rows back."""
        for row in rows:
            self.runner.release(row)


@torch.inference_mode()
def run_static_batches(bare: BareRunner, work: Sequence[tuple[str, int]], batch_size: int) -> float:
    """Static batching: a batch keeps its shape until its longest answer is complete, then the next one starts.

    Args:
        bare: with at least `batch_size` rows.
        work: (question, tokens to generate).
        batch_size: requests per batch.

    Returns:
        Seconds.
    """
    started = time.perf_counter()
    for place in range(0, len(work), batch_size):
        batch = work[place : place + batch_size]
        rows = bare.start([question for question, _ in batch])
        for _ in range(max(count for _, count in batch) - 1):
            tokens = bare.runner.logits(rows).argmax(-1).tolist()
            bare.runner.decode_tokens(rows, tokens, [])
        bare.release(rows)
    return time.perf_counter() - started


@torch.inference_mode()
def seconds_per_group(bare: BareRunner, question: str, repeats: int) -> tuple[float, float]:
    """Seconds for a group's positions in one forward, and one by one (alternating repeats, medians)."""
    group = bare.case.model.config.codebook_token_ids or []
    together, single = [], []
    for _ in range(repeats):
        (row,) = bare.start([question])
        started = time.perf_counter()
        bare.runner.decode_group([row], group)
        bare.runner.logits([row])
        together.append(time.perf_counter() - started)
        started = time.perf_counter()
        for token in group:
            bare.runner.decode_tokens([row], [token], [])
            bare.runner.logits([row])
        single.append(time.perf_counter() - started)
        bare.release([row])
    return sorted(together)[repeats // 2], sorted(single)[repeats // 2]


def _hidden(model: PixelLMForConditionalGeneration, features: ImageFeatures, ids: Tensor) -> Tensor:
    embeds, mask = model.embed_inputs(ids, features, torch.zeros(len(ids), dtype=torch.long))
    return model.language_forward(embeds, mask, torch.arange(ids.shape[1])[None])[0]


def _masks(case: Case, features: ImageFeatures, hidden: Tensor, ids: list[int]) -> list[TargetMask]:
    model = case.model
    rows, positions = find_groups(torch.tensor([ids]), model.config.codebook_token_ids or [])
    embeds = model.codebook_embeds(gather_groups(hidden, rows, positions, model.config.group_size))
    logits = model.decode_masks(embeds, features.scales, rows)
    return finish_targets(logits, case.picture, options=GenerationOptions(), first_index=0, phrases=[""] * len(logits))
