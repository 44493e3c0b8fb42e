"""A backend that answers from a script, and the API around it on a real port: the routes and the page without Ray."""

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import uvicorn

from pixellm.platform.masks import mask_box, rle_encode
from pixellm.platform.settings import ServeSettings
from pixellm.serve.auth import ApiKey
from pixellm.serve.ingress import build_api
from pixellm.serve.metrics import ServiceMetrics
from pixellm.serve.model_card import ModelCard
from pixellm.serve.protocol import Answer, Event, Question, Started, TargetPart, TextPart
from pixellm.serve.roster import Roster, Track, TrackState
from tests.waiting import wait_until

CARD = ModelCard(
    id="scripted",
    version="7",
    reference="models:/scripted/7",
    requested="models:/scripted@champion",
    created_s=1_700_000_000,
    lineage={"name": "scripted", "version": 7, "aliases": ["champion"], "run_id": "abc", "metrics": {"giou": 0.5}},
)


def target_part(index: int, phrase: str, mask_HW: np.ndarray, score: float = 0.875) -> TargetPart:
    rle = rle_encode(mask_HW)
    return TargetPart(
        index=index,
        phrase=phrase,
        score=score,
        box=mask_box(rle),
        area=int(mask_HW.sum()),
        rle={"size": rle["size"], "counts": rle["counts"].decode()},
    )


@dataclass
class ScriptedBackend:
    """Says `words` one by one; `[k]` is followed by target k. Errors are raised for prompts they are keyed by."""

    words: Sequence[str] = ("Here ", "is ", "a ", "thing ", "[1]", ".")
    targets: Sequence[TargetPart] = ()
    errors: dict[str, Exception] = field(default_factory=dict)
    breaks_after: int | None = None
    pause_s: float = 0.0
    replicas: int = 1
    questions: list[Question] = field(default_factory=list)
    num_abandoned: int = 0

    async def answer(self, question: Question) -> Answer:
        self.questions.append(question)
        self._raise_for(question)
        return self._whole()

    async def stream(self, question: Question) -> AsyncGenerator[Event, None]:
        self.questions.append(question)
        self._raise_for(question)
        is_done = False
        try:
            yield Started("7-replica")
            for position, word in enumerate(self.words):
                if self.breaks_after == position:
                    raise RuntimeError("the replica went away")
                await asyncio.sleep(self.pause_s)
                yield TextPart(word)
                for target in self.targets:
                    if word == f"[{target.index + 1}]":
                        yield target
            is_done = True
            yield self._whole()
        finally:
            self.num_abandoned += not is_done

    async def num_ready_replicas(self) -> int:
        return self.replicas

    def _whole(self) -> Answer:
        usage = {"prompt_tokens": 100, "completion_tokens": len(self.words), "image_tokens": 64}
        return Answer("7-replica", "".join(self.words), tuple(self.targets), usage, {"total": 0.25})

    def _raise_for(self, question: Question) -> None:
        for words, error in self.errors.items():
            if words in question.prompt:
                raise error


class FixedModels:
    """Versions that stay in service as they are; by default one, answered by one backend."""

    def __init__(self, backend: ScriptedBackend, **others: tuple[TrackState, ScriptedBackend]) -> None:
        self._backends = {"engines": backend} | {name: other for name, (_state, other) in others.items()}
        first = TrackState(Track(CARD.requested), CARD, "engines")
        self.roster = Roster(1, (first, *(state for state, _other in others.values())))

    def backend(self, app_name: str) -> ScriptedBackend:
        return self._backends[app_name]


class ServedApi:
    """The API on a free loopback port, in a thread."""

    def __init__(
        self, backend: ScriptedBackend, settings: ServeSettings | None = None, keys: Sequence[ApiKey] = ()
    ) -> None:
        self.metrics = ServiceMetrics()
        app = build_api(FixedModels(backend), settings or ServeSettings(), self.metrics, keys)
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> "ServedApi":
        self._thread.start()
        wait_until(lambda: self._server.started, "the start of uvicorn")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
