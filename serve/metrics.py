"""What `/metrics` tells Prometheus. One registry per ingress replica, filled by the routes, the backend and the wire.

What engines know (batch, cache, cold starts) comes with their answers (`EngineReport`), so it costs no call of its own.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from pixellm.serve.protocol import Answer, EngineReport
from pixellm.serve.roster import Roster

_LATENCY_BUCKETS_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64)
_LOAD_BUCKETS_S = (1, 2, 5, 10, 20, 40, 80, 160, 320)
_MAX_REPLICAS = 1000


class ServiceMetrics:
    """The counters of one ingress."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry(auto_describe=True)
        self.requests = Counter("pixellm_requests", "HTTP requests answered.", ["route", "status"], registry=registry)
        self.latency_s = Histogram(
            "pixellm_request_seconds",
            "From arrival to the last byte.",
            ["route"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.first_token_s = Histogram(
            "pixellm_first_token_seconds",
            "From arrival to the first words of a streamed answer.",
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.in_flight = Gauge("pixellm_requests_in_flight", "HTTP requests not yet answered.", registry=registry)
        self.open_questions = Gauge(
            "pixellm_questions_open", "Questions that engines have or that wait for one.", registry=registry
        )
        self.targets = Counter("pixellm_targets", "Masks returned.", registry=registry)
        self.tokens = Counter("pixellm_tokens", "Tokens read and written.", ["kind"], registry=registry)
        self.answers = Counter("pixellm_answers", "Questions answered.", ["model", "version"], registry=registry)
        self.failures = Counter(
            "pixellm_failures", "Questions that ended in an error.", ["model", "version", "kind"], registry=registry
        )
        self.stage_s = Histogram(
            "pixellm_stage_seconds",
            "An answer's seconds by the engine's phases.",
            ["stage", "version"],
            buckets=_LATENCY_BUCKETS_S,
            registry=registry,
        )
        self.batch = Histogram(
            "pixellm_batch_size",
            "Questions that generated together when an answer was ready.",
            buckets=_BATCH_BUCKETS,
            registry=registry,
        )
        self.engine_running = Gauge(
            "pixellm_engine_running", "Questions in generation, as last reported.", ["replica"], registry=registry
        )
        self.engine_waiting = Gauge(
            "pixellm_engine_waiting", "Questions waiting inside a replica.", ["replica"], registry=registry
        )
        self.picture_hits = Counter("pixellm_picture_cache_hits", "Pictures found remembered.", registry=registry)
        self.picture_misses = Counter("pixellm_picture_cache_misses", "Pictures looked at.", registry=registry)
        self.picture_bytes = Gauge(
            "pixellm_picture_cache_bytes", "What remembered pictures take.", ["replica"], registry=registry
        )
        self.cold_starts = Counter("pixellm_cold_starts", "Replicas first heard of.", ["version"], registry=registry)
        self.load_s = Histogram(
            "pixellm_cold_start_seconds", "From loading to ready.", buckets=_LOAD_BUCKETS_S, registry=registry
        )
        self.retries = Counter("pixellm_retries", "Questions sent again because their replica died.", registry=registry)
        self.refused = Counter("pixellm_refused", "Questions refused because the queue was full.", registry=registry)
        self.limited = Counter("pixellm_rate_limited", "Requests beyond their caller's limits.", registry=registry)
        self.cancelled = Counter(
            "pixellm_cancelled", "Questions given up because the client hung up.", registry=registry
        )
        self.feedback = Counter("pixellm_feedback", "Verdicts received.", ["verdict"], registry=registry)
        self.model_info = Gauge(
            "pixellm_model_info", "Versions in service; always 1.", ["model", "version", "share"], registry=registry
        )
        self.model_failed = Gauge(
            "pixellm_model_failed",
            "Versions that were not taken into service.",
            ["track", "version"],
            registry=registry,
        )
        self._reports: dict[str, EngineReport] = {}

    def show_roster(self, roster: Roster) -> None:
        """Brings the gauges of versions in line with a roster."""
        self.model_info.clear()
        self.model_failed.clear()
        for state in roster.tracks:
            if state.card is not None:
                self.model_info.labels(state.card.id, state.card.version, f"{state.track.share:g}").set(1)
            for version, _reason in state.failed:
                self.model_failed.labels(state.track.public_name, version).set(1)

    def count_answer(self, model: str, answer: Answer) -> None:
        """Counts one finished answer."""
        version = answer.model_version
        self.answers.labels(model, version).inc()
        self.targets.inc(len(answer.targets))
        self.tokens.labels("prompt").inc(answer.usage.get("prompt_tokens", 0))
        self.tokens.labels("completion").inc(answer.usage.get("completion_tokens", 0))
        for stage, seconds in answer.timings_s.items():
            self.stage_s.labels(stage, version).observe(seconds)
        if answer.engine is not None:
            self._take_report(answer.engine, version)

    def _take_report(self, report: EngineReport, version: str) -> None:
        before = self._reports.get(report.replica)
        if before is None:
            if len(self._reports) >= _MAX_REPLICAS:  # replicas come and go for ever
                self._forget_replicas()
            self.cold_starts.labels(version).inc()
            self.load_s.observe(report.load_s)
        self._reports[report.replica] = report
        self.batch.observe(max(1, report.running))
        self.engine_running.labels(report.replica).set(report.running)
        self.engine_waiting.labels(report.replica).set(report.waiting)
        self.picture_bytes.labels(report.replica).set(report.picture_cache_bytes)
        # answers of one replica may arrive in another order than they were given
        self.picture_hits.inc(max(0, report.picture_hits - (before.picture_hits if before else 0)))
        self.picture_misses.inc(max(0, report.picture_misses - (before.picture_misses if before else 0)))

    def _forget_replicas(self) -> None:
        self._reports.clear()
        for gauge in (self.engine_running, self.engine_waiting, self.picture_bytes):
            gauge.clear()

    def exposition(self) -> bytes:
        """The text that Prometheus scrapes."""
        return generate_latest(self.registry)
