"""The metrics on `/metrics`, by vLLM's names where vLLM has the same thing.

They have a registry of their own, so that one process can have several servers.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from worker.inference.ipc import Stats

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

GAUGES = {
    "running": ("vllm:num_requests_running", "Sequences that are prefilled or decoded now"),
    "waiting": ("vllm:num_requests_waiting", "Requests waiting to start"),
    "adapters": ("veritune:loaded_adapters", "Adapters in memory"),
    "bases": ("veritune:loaded_bases", "Base models in memory"),
    "prefix_cache_bytes": ("veritune:prefix_cache_bytes", "Bytes held by the prefix cache"),
}
COUNTERS = {
    "prompt_tokens": ("vllm:prompt_tokens", "Prompt tokens of started requests"),
    "generation_tokens": ("vllm:generation_tokens", "Tokens generated"),
    "prefix_queries": ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_hits": ("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache"),
    "prefills": ("veritune:prefills", "Prompts prefilled"),
    "decode_steps": ("veritune:decode_steps", "Decode steps, each of one batch"),
}


class Metrics:
    """Counters, gauges and histograms of one server and its engines."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._gauges = {name: Gauge(*words, registry=self._registry) for name, words in GAUGES.items()}
        self._counters = {name: Counter(*words, registry=self._registry) for name, words in COUNTERS.items()}
        self._last = Stats()
        self.engine_up = Gauge("veritune:engine_up", "1 while an engine is ready", registry=self._registry)
        self.engine_suspended = Gauge(
            "veritune:engine_suspended", "1 while the engine is suspended for training", registry=self._registry
        )
        self.batch_invariant = Gauge(
            "veritune:batch_invariant", "1 if the engine's kernels passed the self-check", registry=self._registry
        )
        self.engine_starts = Gauge("veritune:engine_starts", "Engines started", registry=self._registry)
        self.success = Counter(
            "vllm:request_success", "Completions finished", ["finished_reason"], registry=self._registry
        )
        self.refused = Counter(
            "veritune:requests_refused",
            "Requests answered with an error",
            ["status"],
            registry=self._registry,
        )
        self.first_token = self._histogram("vllm:time_to_first_token_seconds", "Request to first token")
        self.latency = self._histogram("vllm:e2e_request_latency_seconds", "Request to last token")

    def update(self, stats: Stats) -> None:
        """Apply an engine's report. Pass an empty one when it has ended, because the next one counts from zero."""
        for name, gauge in self._gauges.items():
            gauge.set(getattr(stats, name))
        for name, counter in self._counters.items():
            counter.inc(max(0, getattr(stats, name) - getattr(self._last, name)))
        self._last = stats

    def render(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self._registry)

    def _histogram(self, name: str, words: str) -> Histogram:
        return Histogram(name, words, buckets=SECONDS, registry=self._registry)
