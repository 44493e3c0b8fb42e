"""LLaVA's visual instructions (150k): conversations of one or several turns about COCO photographs, without masks."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pixellm.errors import DataError
from pixellm.platform import storage
from pixellm.platform.data.schema import SEG_MARKER, Row, RowDialogue
from pixellm.platform.data.sources.base import Entry, Ledger, PictureSource, licenses_by_file, read_picture
from pixellm.platform.data.sources.coco_format import is_inside
from pixellm.platform.data.sources.picture_ids import picture_id

#: Where the published file has the picture among the words of a conversation's first turn.
IMAGE_MARKER = "<image>"
_PICTURE_FOLDERS = ("train2017", "train2014", "images", "")


@dataclass(frozen=True, slots=True)
class LlavaInstructSource(PictureSource):
    """`llava_instruct_150k.json` (or another file of its form, the only JSON there) beside `train2017/`."""

    name: str = "llava_instruct"
    layout: str = "llava_instruct_150k.json and COCO's train2017/ (or train2014/, or images/)"

    def entries(self, input_uri: str, ledger: Ledger) -> Iterator[Entry]:
        """Yields an entry per picture with all its conversations, in the order of first appearance."""
        conversations = _by_picture(_read_instructions(input_uri, self.layout), ledger)
        folder = _picture_folder(input_uri, self.layout)
        licenses = licenses_by_file(storage.join(input_uri, "instances.json"))
        ledger.total = len(conversations)
        for file_name, of_picture in conversations.items():
            facts = {"conversations": of_picture, "license": licenses.get(file_name, "unknown")}
            yield Entry(file_name, (_picture_uri(folder, file_name),), facts)

    def row(self, entry: Entry, ledger: Ledger) -> Row | None:
        """The picture with its conversations, each cut before its first faulty turn."""
        picture = read_picture(entry.files[0], None, None, entry.label, ledger)
        if picture is None:
            return None
        dialogues: list[RowDialogue] = []
        seen: set[tuple[RowDialogue, ...]] = set()
        for number, turns in enumerate(entry.facts["conversations"]):
            conversation = _conversation(turns, f"{entry.label} conversation {number}", ledger)
            if conversation in seen:
                ledger.skip("duplicate conversation", f"{entry.label} conversation {number}")
            elif conversation:
                seen.add(conversation)
                dialogues += conversation
        if not dialogues:
            ledger.leave_out("picture keeps no conversation", entry.label)
            return None
        return picture.row(picture_id(entry.label), self.name, entry.facts["license"], dialogues=dialogues)


def _read_instructions(input_uri: str, layout: str) -> list[Any]:
    if not storage.is_dir(input_uri):
        raise DataError(f"there is no folder {input_uri}; --in wants {layout}")
    names = [name for name in storage.list_names(input_uri) if name.endswith(".json") and name != "instances.json"]
    name = "llava_instruct_150k.json" if "llava_instruct_150k.json" in names else names[0] if len(names) == 1 else None
    if name is None:
        found = f"several JSON files ({', '.join(names)})" if names else "no JSON file"
        raise DataError(f"{input_uri} holds {found}, llava_instruct_150k.json is missing; --in wants {layout}")
    uri = storage.join(input_uri, name)
    content = storage.read_json(uri)
    if not isinstance(content, list):
        raise DataError(f"{uri} holds a JSON {type(content).__name__}, wanted a list of conversations")
    return content


def _by_picture(entries: Sequence[Any], ledger: Ledger) -> dict[str, list[Any]]:
    by_picture: dict[str, list[Any]] = {}
    for number, entry in enumerate(entries):
        name = f"entry {number}"
        if not isinstance(entry, dict) or not isinstance(entry.get("conversations"), list):
            ledger.skip("entry holds no conversation", name)
        elif not isinstance(entry.get("image"), str) or not entry["image"]:
            ledger.leave_out("conversation without a picture", name)
        elif not is_inside(entry["image"]):
            ledger.skip("file name leaves the picture folder", name, entry["image"])
        else:
            by_picture.setdefault(entry["image"], []).append(entry["conversations"])
    return by_picture


def _picture_folder(input_uri: str, layout: str) -> str:
    """The first of the known folders that is there; "" stands for names that bring their folder with them."""
    for folder in _PICTURE_FOLDERS:
        if folder and storage.is_dir(storage.join(input_uri, folder)):
            return storage.join(input_uri, folder)
    if any("." not in name for name in storage.list_names(input_uri)):
        return input_uri
    raise DataError(f"{input_uri}: the picture folder train2017 is missing; --in wants {layout}")


def _picture_uri(folder: str, file_name: str) -> str:
    """Names of the mixed release bring the official folders ("coco/train2017/X.jpg"), those of the 150k do not."""
    direct = storage.join(folder, file_name)
    return direct if "/" not in file_name or storage.exists(direct) else storage.join(folder, file_name.split("/")[-1])


def _conversation(turns: Sequence[Any], name: str, ledger: Ledger) -> tuple[RowDialogue, ...]:
    dialogues: list[RowDialogue] = []
    for number in range(0, len(turns), 2):
        pair = [turn if isinstance(turn, dict) else {} for turn in turns[number : number + 2]]
        fault = _fault(pair)
        if fault is not None:
            ledger.skip(fault, f"{name} turn {number // 2}")
            break
        question = " ".join(str(pair[0]["value"]).replace(IMAGE_MARKER, " ").split())
        dialogues.append(RowDialogue("vqa", question, str(pair[1]["value"]).strip(), turn=number // 2))
    return tuple(dialogues)


def _fault(pair: Sequence[Mapping[str, Any]]) -> str | None:
    if [turn.get("from") for turn in pair] == ["human"]:
        return "question without an answer"
    if [turn.get("from") for turn in pair] != ["human", "gpt"]:
        return "turns of person and model do not alternate"
    question, answer = (str(turn.get("value") or "").replace(IMAGE_MARKER, " ").strip() for turn in pair)
    if not question or not answer:
        return "question or answer is empty"
    return "text holds a target marker" if SEG_MARKER in question + answer else None
