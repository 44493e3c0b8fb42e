"""Where a generated answer stands: tokens so far, words that are final, stop strings, and when it ends. No tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from pixellm.model.answers import AnswerReader
from pixellm.model.engine.types import GenerationOptions


@dataclass
class AnswerState:
    """One answer under way.

    Attributes:
        reader: turns ids into words, markers and phrases.
        options: limits and stop strings.
        codebook: ids of one group.
        eos_id: ends an answer.
        max_tokens: most tokens that the answer may have, of the request and of the context.
        token_ids: generated so far, groups written out.
        num_targets: finished groups.
        stop_reason: set once the answer has ended.
        dropped: what was left out, in words.
    """

    reader: AnswerReader
    options: GenerationOptions
    codebook: Sequence[int]
    eos_id: int | None
    max_tokens: int
    token_ids: list[int] = field(default_factory=list)
    num_targets: int = 0
    stop_reason: str | None = None
    dropped: str | None = None
    _num_emitted: int = 0
    _words_start: int = 0
    _end: int | None = None

    @property
    def text(self) -> str:
        """The words so far, or the whole answer once it has ended."""
        return self.reader.text[: self._end]

    def choose(self, token_id: int) -> list[int]:
        """Takes the token that was sampled and says what to run through the model next.

        Args:
            token_id: sampled outside a group.

        Returns:
            The token alone, or the whole group that it starts; empty where the answer ends here.
        """
        if token_id == self.eos_id:
            self.stop_reason = "eos"
            return []
        is_group = token_id == self.codebook[0]
        if is_group and self.num_targets == self.options.max_targets:
            self.stop_reason = "max_targets"
            self.dropped = f"target {self.num_targets + 1} and what follows it (max_targets)"
            return []
        chunk = list(self.codebook) if is_group else [token_id]
        left = self.max_tokens - len(self.token_ids)
        if len(chunk) > left:
            self.stop_reason = self._length_reason()
            self.dropped = (
                f"target {self.num_targets + 1}: its group takes {len(chunk)} tokens and {left} were left "
                f"({self.stop_reason})"
            )
            return []
        self.token_ids += chunk
        return chunk

    def add_word(self, token_id: int) -> str:
        """Takes a chosen token that starts no group and returns the words that became final; may end the answer."""
        self.reader.add_token(token_id)
        delta = self._emit(is_last=False)
        self._end_if_full()
        return delta

    def add_group(self) -> str:
        """Takes a group that has been run and returns the words up to its marker; may end the answer."""
        self.reader.add_group()
        self.num_targets += 1
        self._words_start = len(self.reader.text)
        self._end_if_full()
        return self._emit(is_last=True)

    def finish(self) -> str:
        """Returns the words that were held back; call once the answer has ended."""
        if self._end is not None:
            return ""
        self.reader.finish()
        return self._emit(is_last=True)

    def phrase(self) -> str:
        """The phrase of the last finished group."""
        return self.reader.phrases[-1]

    def _length_reason(self) -> str:
        return "max_new_tokens" if self.max_tokens >= self.options.max_new_tokens else "context_full"

    def _end_if_full(self) -> None:
        if self.stop_reason is None and len(self.token_ids) >= self.max_tokens:
            self.stop_reason = self._length_reason()

    def _emit(self, *, is_last: bool) -> str:
        """Returns what can no longer become part of a stop string, and cuts the answer in front of a complete one."""
        text, stops = self.reader.text, self.options.stop
        longest = max(map(len, stops), default=0)
        start = max(self._words_start, self._num_emitted - longest)
        places = [place for place in (text.find(stop, start) for stop in stops) if place >= 0]
        if places and self._end is None:
            self._end, self.stop_reason = min(places), "stop_string"
        safe = self._end if self._end is not None else len(text)
        if self._end is None and not is_last:
            safe -= max((_held_back(text, stop) for stop in stops), default=0)
        delta = text[self._num_emitted : max(safe, self._num_emitted)]
        self._num_emitted = max(safe, self._num_emitted)
        return delta


def _held_back(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
