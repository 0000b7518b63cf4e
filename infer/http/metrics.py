"""What the server counts, for Prometheus."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from v4_jax.infer.http.service import Service

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server, in a registry of their own.

    Attributes:
      requests: finished requests, by path and status.
      prompt_tokens: read.
      cached_tokens: of those prompts, which were in the prefix cache.
      generated_tokens: made.
      first_token: seconds until a request's first token.
      duration: seconds until a request's last token.
      between_tokens: mean seconds between a sample's tokens, one value a request.
    """

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"namespace": "v4_jax", "registry": self.registry}
        self.requests = Counter("requests", "Finished requests", ["path", "status"], **own)
        self.prompt_tokens = Counter("prompt_tokens", "Prompt tokens of requests that were served", **own)
        self.cached_tokens = Counter("cached_tokens", "Of the prompt tokens, those that were not read again", **own)
        self.generated_tokens = Counter("generated_tokens", "Tokens generated", **own)
        self.first_token = Histogram("first_token_seconds", "Until the first token", buckets=_SECONDS, **own)
        self.duration = Histogram("request_seconds", "Until the last token", buckets=_SECONDS, **own)
        fine = tuple(limit / 100 for limit in _SECONDS)
        self.between_tokens = Histogram("token_seconds", "Between tokens, mean of a request", buckets=fine, **own)
        for name, text, value in (
            ("active_requests", "Requests that are served or wait", lambda: service.active),
            ("waiting_requests", "Requests that wait for slots or pages", lambda: service.engine.waiting),
            ("slots", "Samples that can be generated at the same time", lambda: service.engine.slots),
            ("pages", "Pages of the cache", lambda: service.engine.pages),
            ("used_pages", "Pages of the cache that belong to requests", lambda: service.engine.pages_used),
            ("draft_steps", "Steps so far of rows that take drafts", lambda: service.engine.draft_steps),
        ):
            Gauge(name, text, **own).set_function(value)
        drafts = Gauge("drafts", "Drafts so far, by depth, and whether they were right", ["depth", "outcome"], **own)
        for depth in range(service.engine.draft_depth):
            offered, accepted = drafts.labels(depth + 1, "offered"), drafts.labels(depth + 1, "accepted")
            offered.set_function(lambda depth=depth: service.engine.acceptance[depth].offered)
            accepted.set_function(lambda depth=depth: service.engine.acceptance[depth].accepted)

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)
