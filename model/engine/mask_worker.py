"""Decodes masks beside the token loop: every finished group of every request that is ready goes into one batch.

The token loop hands over a group's hidden states and goes on; this thread turns them into masks at the pictures' own
sizes and tells the requests. Batches are bounded, so that memory does not grow with the number of targets.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pixellm.errors import PixelLMError, ServingError
from pixellm.model.backbone import ImageFeatures, MultimodalBackbone
from pixellm.model.engine.targets import finish_targets
from pixellm.model.engine.types import GenerationOptions, TargetMask
from pixellm.model.images import PreparedImage

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True)
class MaskJob:
    """One finished group.

    Attributes:
        hidden_JD: states at the positions that predict the group's tokens.
        features: of the one picture it is about.
        picture: its sizes.
        options: of the request: threshold, and whether logits are handed out.
        index: the target's place in its answer.
        phrase: words that name it.
        done: told the target and the seconds that its share of the batch took, or the error.
    """

    hidden_JD: torch.Tensor
    features: ImageFeatures
    picture: PreparedImage
    options: GenerationOptions
    index: int
    phrase: str
    done: Callable[[TargetMask | PixelLMError, float], None]


class MaskWorker:
    """A thread that decodes mask jobs in batches."""

    def __init__(self, model: MultimodalBackbone, max_batch_targets: int) -> None:
        """Starts the thread.

        Args:
            model: decodes.
            max_batch_targets: most targets that are decoded together.
        """
        self._model = model
        self._max_batch_targets = max_batch_targets
        self._jobs: queue.SimpleQueue[MaskJob | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="pixellm-masks", daemon=True)
        self._thread.start()

    def submit(self, job: MaskJob) -> None:
        """Hands a group over and returns at once."""
        self._jobs.put(job)

    def close(self) -> None:
        """Finishes what was handed over, then ends the thread. Safe from any thread."""
        self._jobs.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            if job is None:
                return
            batch, is_last = self._with_all_ready(job)
            started = time.monotonic()
            try:
                targets: list[TargetMask | PixelLMError] = list(decode_jobs(self._model, batch))
            except Exception as error:  # thread boundary: the requests must hear of it
                _LOGGER.exception("decoding %d masks failed", len(batch))
                failure = ServingError(f"decoding masks failed ({type(error).__name__}: {error}); try again")
                targets = [failure] * len(batch)
            seconds = (time.monotonic() - started) / len(batch)
            for member, target in zip(batch, targets, strict=True):
                member.done(target, seconds)
            if is_last:
                return

    def _with_all_ready(self, first: MaskJob) -> tuple[list[MaskJob], bool]:
        batch = [first]
        while len(batch) < self._max_batch_targets:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is None:
                return batch, True
            batch.append(job)
        return batch, False


def decode_in_batches(model: MultimodalBackbone, jobs: list[MaskJob], max_batch_targets: int) -> list[TargetMask]:
    """Decodes any number of jobs, at most `max_batch_targets` together, so that memory is bounded."""
    starts = range(0, len(jobs), max_batch_targets)
    return [target for start in starts for target in decode_jobs(model, jobs[start : start + max_batch_targets])]


def decode_jobs(model: MultimodalBackbone, jobs: list[MaskJob]) -> list[TargetMask]:
    """Decodes jobs of any pictures in one batch; targets come back in the order of the jobs."""
    pictures: dict[int, int] = {}
    features: list[ImageFeatures] = []
    for job in jobs:
        if id(job.features) not in pictures:
            pictures[id(job.features)] = len(features)
            features.append(job.features)
    hidden_MJD = torch.stack([job.hidden_JD for job in jobs])
    scales = torch.cat([f.scales for f in features])
    image_index = torch.tensor([pictures[id(job.features)] for job in jobs], device=hidden_MJD.device)
    logits = model.decode_masks(model.codebook_embeds(hidden_MJD), scales, image_index)
    return [
        finish_targets(
            logits[place : place + 1],
            job.picture,
            options=job.options,
            first_index=job.index,
            phrases=[job.phrase],
        )[0]
        for place, job in enumerate(jobs)
    ]
