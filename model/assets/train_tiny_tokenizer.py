"""Trains the tiny byte-level BPE tokenizer that the `tiny` and `small` presets use.

Run `python model/assets/train_tiny_tokenizer.py` to write `model/assets/tiny_tokenizer` again. The text is ours: the
conversation and answer templates below, COCO's category names, and the captions and dialogues that ship with the demo
data (CC BY 4.0, attribution beside them). Special ids follow Llama: `<unk>` 0, `<s>` 1, `</s>` 2.
"""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

ASSETS_DIR = Path(__file__).parent
DEMO_DIR = ASSETS_DIR.parents[1] / "platform" / "data" / "demo"
VOCAB_SIZE = 1000

COCO_CATEGORY_LIST = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign, "
    "parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, "
    "handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, "
    "surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, "
    "broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, "
    "laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, "
    "scissors, teddy bear, hair drier, toothbrush"
)

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
QUESTIONS = (
    "Segment the {}.",
    "Please segment the {} in this image.",
    "Can you segment the {} in this picture?",
    "Could you show me the {}? Please respond with a segmentation mask.",
    "Where is the {} in this image? Please output segmentation mask.",
    "What is the {} in this picture? Please respond with segmentation masks for each object.",
    "Segment the {} and the {}.",
    "Which object is on the left, the {} or the {}? Why?",
    "How many {} are there? Describe the scene in one sentence.",
)
ANSWERS = (
    "Sure, it is {seg}.",
    "It is {seg}.",
    "Sure, {seg}.",
    "Sure, the segmentation result is {seg}.",
    "The {} is {seg}, and the {} is {seg}.",
    "Sure, {} are {seg}, {seg} and {seg}, separately.",
    "There is a {} {seg} next to a {} {seg} in the background.",
    "The first, the second, the third, the fourth and the other objects in the foreground.",
    "0 1 2 3 4 5 6 7 8 9, left, right, top, bottom, middle; yes: no! (both)",
)


def training_text() -> list[str]:
    """All lines the tokenizer learns from."""
    lines = [SYSTEM, "USER: ASSISTANT:"] * 20
    names = COCO_CATEGORY_LIST.split(", ")
    for index, name in enumerate(names):
        other = names[(index + 7) % len(names)]
        for template in (*QUESTIONS, *ANSWERS):
            lines.append(template.replace("{seg}", "").replace("{}", name, 1).replace("{}", other))
        lines.extend([f"The {name}.", f"{name} {name}s", f"a {name}, {other} and {name}"] * 4)
    captions = json.loads((DEMO_DIR / "captions.json").read_text(encoding="utf-8"))
    captions = captions["annotations"] if isinstance(captions, dict) else captions
    lines.extend(caption["caption"].strip() for caption in captions)
    dialogues_path = DEMO_DIR / "muse.json"
    if dialogues_path.exists():
        for item in json.loads(dialogues_path.read_text(encoding="utf-8")):
            texts = [*item["questions"], *(item.get("text_answers") or [])]
            lines.extend(text.replace("{seg}", "") for text in texts if text)
    return lines


def train() -> PreTrainedTokenizerFast:
    """Trains and wraps the tokenizer."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        min_frequency=2,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(training_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
    )


if __name__ == "__main__":
    train().save_pretrained(ASSETS_DIR / "tiny_tokenizer")
