"""Words for targets: position words that tell instances of one category apart, and English plurals."""

from collections.abc import Sequence
from itertools import pairwise

from pixellm.platform.masks import Box

#: Centres nearer than this share of the picture's side are not told apart by position.
_MIN_GAP_SHARE = 0.08

_IRREGULAR_PLURALS = {"person": "people", "mouse": "mice", "knife": "knives", "sheep": "sheep", "man": "men"}
_IRREGULAR_PLURALS |= {"woman": "women", "child": "children", "goose": "geese", "leaf": "leaves", "shelf": "shelves"}
_DETERMINERS = frozenset(
    ("the", "a", "an", "one", "his", "her", "its", "their", "this", "that", "these", "those", "some")
)
_ALWAYS_PLURAL = ("scissors", "skis", "pants", "trousers", "glasses", "people", "broccoli", "sheep", "grass")


def position_phrases(category: str, boxes: Sequence[Box], height: int, width: int) -> list[str]:
    """Names each instance of a category, by position where that tells it apart from all the others.

    Args:
        category: its name, e.g. "banana".
        boxes: of all its instances in the picture, (x0, y0, x1, y1) pixels.
        height: of the picture, pixels.
        width: of the picture, pixels.

    Returns:
        One phrase per box, in order: "the left banana" without the article for a told-apart instance, the bare
        category for the others (and for a single instance).
    """
    phrases = [category] * len(boxes)
    if len(boxes) < 2:
        return phrases
    across = [(box[0] + box[2]) / 2 / width for box in boxes]
    down = [(box[1] + box[3]) / 2 / height for box in boxes]
    spread_across, spread_down = max(across) - min(across), max(down) - min(down)
    if spread_across >= spread_down:
        words = ("left", "middle", "right") if len(boxes) <= 3 else ("leftmost", "", "rightmost")
        _name_ends(phrases, category, across, words)
    else:
        words = ("upper", "middle", "lower") if len(boxes) <= 3 else ("topmost", "", "bottommost")
        _name_ends(phrases, category, down, words)
    return phrases


def plural(noun: str) -> str:
    """The plural of an English noun phrase: its last word is inflected ("wine glass" → "wine glasses")."""
    head, space, last = noun.rpartition(" ")
    return head + space + _plural_word(last)


def definite(phrase: str) -> str:
    """The phrase as it stands in a sentence: with "the", unless it brings its own determiner."""
    return phrase if is_described(phrase) else f"the {phrase}"


def is_described(phrase: str) -> bool:
    """Whether a phrase is a description in a sentence's form ("the cat on the left") rather than a bare name."""
    return phrase.partition(" ")[0].lower() in _DETERMINERS


def _name_ends(phrases: list[str], category: str, centres: Sequence[float], words: tuple[str, str, str]) -> None:
    order = sorted(range(len(centres)), key=lambda index: centres[index])
    gaps = [centres[after] - centres[before] for before, after in pairwise(order)]
    first, middle, last = words
    if gaps[0] >= _MIN_GAP_SHARE:
        phrases[order[0]] = f"{first} {category}"
    if gaps[-1] >= _MIN_GAP_SHARE:
        phrases[order[-1]] = f"{last} {category}"
    if len(order) == 3 and min(gaps) >= _MIN_GAP_SHARE:
        phrases[order[1]] = f"{middle} {category}"


def _plural_word(word: str) -> str:
    if word in _IRREGULAR_PLURALS:
        return _IRREGULAR_PLURALS[word]
    if word in _ALWAYS_PLURAL:
        return word
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return word[:-1] + "ies"
    return word + "s"
