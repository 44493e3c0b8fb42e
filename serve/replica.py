"""The engine deployment: weights loaded once per replica, questions in, words and run lengths out.

The driver that deploys imports this module, and Ray Serve's replica process builds the class: torch is imported only
there.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from pixellm.platform.settings import ServeSettings, TrackingSettings
from pixellm.serve.model_card import ModelCard
from pixellm.serve.protocol import Answer, Event, Question, Refusal


class EngineReplica:
    """One engine that answers questions, many at a time.

    Args:
        card: which version to load.
        settings: batch size, threads, limits.
        tracking: the registry that `card.reference` is looked up in.

    Raises:
        ModelLoadError: the model does not load, or does not answer its golden example as it did when it was stored.
            Serve reports it, and the replica takes no traffic.
    """

    def __init__(self, card: ModelCard, settings: ServeSettings, tracking: TrackingSettings) -> None:
        from pixellm.serve.engine_bridge import EngineBridge  # slow: torch, transformers

        self._bridge = EngineBridge(card, settings, tracking)

    async def answer(self, question: Question) -> Answer | Refusal:
        """The whole answer; a question that cannot be answered as it is comes back as a `Refusal`."""
        return await self._bridge.answer(question)

    async def stream(self, question: Question) -> AsyncGenerator[list[Event], None]:
        """The answer as it comes, several events together when they came faster than they were fetched.

        `Started` comes first, together with the first words; `Answer` last. A `Refusal` is the only event.
        """
        async with aclosing(self._bridge.stream(question)) as batches:
            async for batch in batches:
                yield batch

    def check_health(self) -> None:
        """What Serve asks every few seconds; raising makes it replace this replica.

        Raises:
            ServingError: the engine has had questions to answer and made no step for `stall_timeout_s`.
        """
        self._bridge.check_health()

    def __del__(self) -> None:
        """Ends the engine's threads when Serve retires the replica."""
        bridge = getattr(self, "_bridge", None)
        if bridge is not None:
            bridge.close()
