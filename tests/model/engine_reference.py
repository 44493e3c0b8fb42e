"""The slow way to answer: the whole prompt and answer run again for every token, without a cache, one at a time."""

from typing import Any

import torch


@torch.inference_mode()
def answer_alone(model: Any, processor: Any, image: Any, prompt: str, max_new_tokens: int) -> tuple[list[int], Any]:
    """Greedy ids and mask logits at the picture's own size, the slow way."""
    picture = processor.prepare_image(image)
    valid = torch.tensor([picture.valid_hw])
    features = model.encode_images(processor.normalise(torch.from_numpy(picture.pixels)[None], valid), valid)
    codebook = model.config.codebook_token_ids
    ids, answer, groups = processor.encode_prompt(prompt), [], []
    while len(answer) < max_new_tokens:
        hidden = run_whole(model, features, ids)
        logits = model.lm_logits(hidden[-1])
        logits[[*codebook[1:], model.config.im_start_id, model.config.im_end_id]] = float("-inf")
        token = int(logits.argmax())
        if token == model.config.text_config.eos_token_id:
            break
        chunk = codebook if token == codebook[0] else [token]
        if len(answer) + len(chunk) > max_new_tokens:
            break
        if token == codebook[0]:
            groups.append(len(ids))
        ids, answer = ids + chunk, answer + chunk
    if not groups:
        return answer, torch.zeros(0, *picture.original_hw)
    hidden = run_whole(model, features, ids)
    states = torch.stack([hidden[start - 1 : start - 1 + len(codebook)] for start in groups])
    masks = model.decode_masks(
        model.codebook_embeds(states), features.scales, torch.zeros(len(groups), dtype=torch.long)
    )
    return answer, processor.post_process(masks, picture.valid_hw, picture.original_hw)


def run_whole(model: Any, features: Any, ids: list[int]) -> torch.Tensor:
    embeds, mask = model.embed_inputs(torch.tensor([ids]), features, torch.zeros(1, dtype=torch.long))
    return model.language_forward(embeds, mask, torch.arange(len(ids))[None])[0][0]
