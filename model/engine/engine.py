"""`PixelLMEngine`: answers questions about pictures with words and masks.

One vision pass per request, a key/value cache, and a group of codebook tokens committed in one forward as soon as its
first token is chosen. Hidden states are kept only where a mask needs them.
"""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from pixellm.model.answers import AnswerReader
from pixellm.model.conversation import Turn, history_turns
from pixellm.model.engine.sampling import RowSampler, banned_tokens, sample_tokens
from pixellm.model.engine.targets import finish_targets
from pixellm.model.engine.types import (
    Done,
    GenerationOptions,
    SegmentationResult,
    SegmentRequest,
    StreamEvent,
    TargetDone,
    TargetMask,
    TextDelta,
    Usage,
)
from pixellm.model.modeling import PixelLMForConditionalGeneration
from pixellm.model.processing import PixelLMProcessor


class PixelLMEngine:
    """Answers questions about pictures.

    Attributes:
        model: the network, in evaluation mode.
        processor: its processor; codebook ids are checked against the model's.
    """

    def __init__(
        self, model: PixelLMForConditionalGeneration, processor: PixelLMProcessor, *, max_batch_size: int = 8
    ) -> None:
        """Takes a loaded model.

        Args:
            model: the network.
            processor: must be the one that belongs to it.
            max_batch_size: most requests that are generated together.

        Raises:
            ModelLoadError: tokenizer and model do not belong together.
        """
        processor.check_matches(model.config)
        self.model = model.eval()
        self.processor = processor
        self.max_batch_size = max_batch_size
        ids = processor.token_ids
        self._banned = banned_tokens(model.config.text_config.vocab_size, ids.codebook, (ids.im_start, ids.im_end)).to(
            model.device
        )

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str = "cpu", max_batch_size: int = 8) -> "PixelLMEngine":
        """Loads a model folder.

        Raises:
            ModelLoadError: weights or tokenizer are missing, damaged or of another model.
        """
        processor = PixelLMProcessor.from_pretrained(path)
        model = PixelLMForConditionalGeneration.from_pretrained(path).to(device)
        return cls(model, processor, max_batch_size=max_batch_size)

    def segment(
        self,
        image: Image.Image | bytes,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        threshold: float = 0.5,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        history: Sequence[tuple[str, str]] = (),
    ) -> SegmentationResult:
        """Answers one question; see `GenerationOptions` for the options and `SegmentRequest` for the history.

        Raises:
            DataError: the picture or the prompt cannot be used.
            BadRequestError: an option is out of range.
        """
        options = GenerationOptions(max_new_tokens, threshold, temperature, top_p, seed, tuple(stop))
        return self.segment_batch([SegmentRequest(image, prompt, options, tuple(history))])[0]

    def segment_batch(self, requests: Sequence[SegmentRequest]) -> list[SegmentationResult]:
        """Answers several questions; results are in the order of the requests."""
        return [self._last(self._run(request)) for request in requests]

    def stream(
        self,
        image: Image.Image | bytes,
        prompt: str,
        *,
        max_new_tokens: int = 256,
        threshold: float = 0.5,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        history: Sequence[tuple[str, str]] = (),
    ) -> Iterator[StreamEvent]:
        """Answers one question as it is generated: `TextDelta` and `TargetDone` in order, then `Done`."""
        options = GenerationOptions(max_new_tokens, threshold, temperature, top_p, seed, tuple(stop))
        return self._run(SegmentRequest(image, prompt, options, tuple(history)))

    @staticmethod
    def _last(events: Iterator[StreamEvent]) -> SegmentationResult:
        *_, last = events
        assert isinstance(last, Done)
        return last.result

    @torch.inference_mode()
    def _run(self, request: SegmentRequest) -> Iterator[StreamEvent]:
        started = time.perf_counter()
        processor, model, options = self.processor, self.model, request.options
        picture = processor.prepare_image(request.image)
        prompt_ids = processor.encode_prompt([*history_turns(request.history), Turn(request.prompt)])
        valid = torch.tensor([picture.valid_hw])
        pixels = processor.normalise(torch.from_numpy(picture.pixels)[None], valid)
        features = model.encode_images(pixels.to(model.device, model.dtype), valid.to(model.device))
        vision_done = time.perf_counter()
        ids = torch.tensor([prompt_ids], device=model.device)
        embeds, mask = model.embed_inputs(ids, features, torch.zeros(1, dtype=torch.long, device=model.device))
        hidden, mask, cache = self._forward(embeds, mask, None, 0)
        prefill_done = time.perf_counter()
        reader = AnswerReader(processor.tokenizer, request.prompt)
        sampler = RowSampler(options)
        codebook = list(processor.token_ids.codebook)
        generated: list[int] = []
        targets: list[TargetMask] = []
        dropped, stop_reason, masks_s = None, "max_new_tokens", 0.0
        while len(generated) < options.max_new_tokens:
            token = sample_tokens(model.lm_logits(hidden[:, -1]), self._banned, [sampler])[0]
            if token == processor.tokenizer.eos_token_id:
                stop_reason = "eos"
                break
            chunk = codebook if token == codebook[0] else [token]
            if len(generated) + len(chunk) > options.max_new_tokens:
                dropped = f"target {len(targets) + 1}: its group of {len(chunk)} tokens did not fit in max_new_tokens"
                break
            past = len(prompt_ids) + len(generated)
            generated += chunk
            embeds = model.get_input_embeddings()(torch.tensor([chunk], device=model.device))
            mask = torch.cat([mask, mask.new_ones((1, len(chunk)))], dim=1)
            previous = hidden[:, -1:]
            hidden, mask, cache = self._forward(embeds, mask, cache, past)
            if len(chunk) == 1 and token != codebook[0]:
                delta = reader.add_token(token)
                if delta:
                    yield TextDelta(delta)
                continue
            yield TextDelta(reader.add_group())
            decode_started = time.perf_counter()
            group = torch.cat([previous, hidden[:, :-1]], dim=1)
            logits = model.decode_masks(
                model.codebook_embeds(group), features.scales, torch.zeros(1, dtype=torch.long, device=model.device)
            )
            targets += finish_targets(
                logits, picture, threshold=options.threshold, first_index=len(targets), phrases=reader.phrases[-1:]
            )
            masks_s += time.perf_counter() - decode_started
            yield TargetDone(targets[-1])
        tail = reader.finish()
        if tail:
            yield TextDelta(tail)
        ended = time.perf_counter()
        timings = {
            "vision": vision_done - started,
            "prefill": prefill_done - vision_done,
            "decode": ended - prefill_done - masks_s,
            "masks": masks_s,
            "total": ended - started,
        }
        usage = Usage(len(prompt_ids), len(generated), processor.num_image_tokens)
        yield Done(
            SegmentationResult(reader.text, tuple(targets), usage, timings, dropped, stop_reason, tuple(generated))
        )

    def _forward(
        self, embeds: torch.Tensor, mask: torch.Tensor, cache: Any, past: int
    ) -> tuple[torch.Tensor, torch.Tensor, Any]:
        positions = torch.arange(past, past + embeds.shape[1], device=embeds.device)[None]
        hidden, cache = self.model.language_forward(embeds, mask, positions, cache, use_cache=True)
        return hidden, mask, cache
