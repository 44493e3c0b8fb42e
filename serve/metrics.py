"""What `/metrics` tells Prometheus. One registry per ingress replica, filled by the routes and the backend."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class ServiceMetrics:
    """The counters of one ingress.

    Args:
        model: id of the served model.
        version: its version, as the `X-Model-Version` header gives it.
    """

    def __init__(self, model: str, version: str) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self.requests = Counter(
            "pixellm_requests", "HTTP requests answered.", ["route", "status"], registry=self.registry
        )
        self.latency_s = Histogram(
            "pixellm_request_seconds",
            "From arrival to the last byte.",
            ["route"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.first_token_s = Histogram(
            "pixellm_first_token_seconds",
            "From arrival to the first words of a streamed answer.",
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self.in_flight = Gauge("pixellm_requests_in_flight", "HTTP requests not yet answered.", registry=self.registry)
        self.targets = Counter("pixellm_targets", "Masks returned.", registry=self.registry)
        self.tokens = Counter("pixellm_tokens", "Tokens read and written.", ["kind"], registry=self.registry)
        self.retries = Counter(
            "pixellm_retries", "Questions sent again because their replica died.", registry=self.registry
        )
        self.refused = Counter(
            "pixellm_refused", "Questions refused because the queue was full.", registry=self.registry
        )
        self.cancelled = Counter(
            "pixellm_cancelled", "Questions given up because the client hung up.", registry=self.registry
        )
        info = Gauge(
            "pixellm_model_info", "The served version; always 1.", ["model", "version"], registry=self.registry
        )
        info.labels(model, version).set(1)

    def count_answer(self, num_targets: int, prompt_tokens: int, completion_tokens: int) -> None:
        """Counts one finished answer."""
        self.targets.inc(num_targets)
        self.tokens.labels("prompt").inc(prompt_tokens)
        self.tokens.labels("completion").inc(completion_tokens)

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
