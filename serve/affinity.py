"""Questions about one picture go to the replica that looked at it: its features are remembered there.

Which replica that is follows from the picture's digest and the replicas' names alone (rendezvous hashing), so every
ingress agrees without asking, and a replica that comes or goes moves only its own share of the pictures.
"""

import hashlib
import random
from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from pixellm.serve.protocol import Question


def home_of(picture_digest: str, replica_names: Sequence[str]) -> int:
    """Index of the replica that a picture belongs to; every replica gets an equal share of pictures."""
    return max(
        range(len(replica_names)),
        key=lambda i: hashlib.blake2b(f"{picture_digest} {replica_names[i]}".encode(), digest_size=8).digest(),
    )


class PictureRouter(RequestRouter):
    """Ray Serve's choice of a replica: the picture's own first, two random others where that one has no room."""

    def initialize_state(self, *, busy_at: float) -> None:
        """Takes the option of `RequestRouterConfig`.

        Args:
            busy_at: open questions from which a replica counts as busy, so that another one may look at the picture.
        """
        self._busy_at = busy_at

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Replicas by rank; Serve takes the least busy of the first rank that has room."""
        if not candidate_replicas:
            return []
        if pending_request is not None:
            # Otherwise Ray Serve asks full replicas again without a pause, and what they do to answer slows the engine.
            pending_request.routing_context.should_backoff = True
        question = pending_request.args[0] if pending_request is not None and pending_request.args else None
        digest = question.picture_digest if isinstance(question, Question) else ""
        pair = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if not digest or len(candidate_replicas) == 1:
            return [pair]
        home = candidate_replicas[home_of(digest, [replica.replica_id.unique_id for replica in candidate_replicas])]
        num_open = self.replica_queue_len_cache.get(home.replica_id) or 0
        if num_open >= self._busy_at:
            return [pair, [home]]
        return [[home], pair]
