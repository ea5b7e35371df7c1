"""The server's metrics, for Prometheus."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.core import CounterMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from mlx_diffgemma.chat.reply import Reply
from mlx_diffgemma.prefix_cache import PrefixCache
from mlx_diffgemma.scheduler.device import Counters
from mlx_diffgemma.scheduler.engine import Engine

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """The metrics of one server, in their own registry.

    The status label of ``requests`` is the status of the response, with two exceptions: 499 means that the client left, and a
    stream that ended in an error has the status of that error.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered.", "route", "status")
        self.duration = self._histogram(
            "request_duration_seconds", "Seconds from the request to the end of its response.", "route"
        )
        self.first_text = self._histogram(
            "time_to_first_text_seconds", "Seconds from the request to the first text of its response.", "route"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens, counted once per choice.")
        self.cached_tokens = self._counter(
            "cached_prompt_tokens", "Prompt tokens found in the prefix cache, counted once per choice."
        )
        self.new_tokens = self._counter("new_tokens", "Tokens written in replies.")
        self.denoising_steps = self._counter("denoising_steps", "Denoising steps, summed over all canvases.")
        self.unsettled = self._counter("unsettled_tokens", "Tokens sent as settled and changed later; 0 if the rule is sound.")
        self.cancellations = self._counter("cancellations", "Requests whose client left before the response ended.")
        self.refused = self._counter(
            "connections_refused", "Connections refused or closed before a response, by reason.", "reason"
        )
        self.key_requests = self._counter("key_requests", "Requests answered, by the name of their API key.", "key")
        self.key_tokens = self._counter(
            "key_tokens", "Tokens of prompts and replies, by the name of their API key.", "key", "kind"
        )
        self._gauge("requests_running", "Requests in progress.", lambda: engine.running)
        self._gauge("requests_waiting", "Requests in the queue.", lambda: engine.waiting)
        self.registry.register(_Passes(engine.counters))

    def watch_connections(self, count: Callable[[], float], lingering: Callable[[], float]) -> None:
        """Add gauges for the connections."""
        self._gauge("connections_open", "Connections that are counted against the limits.", count)
        self._gauge("connections_lingering", "Refused connections whose clients have not read the response yet.", lingering)

    def watch_log(self, dropped: Callable[[], float]) -> None:
        """Add a counter for lines of the log that were dropped."""
        self.registry.register(_DroppedLines(dropped))

    def watch(self, kept: PrefixCache) -> None:
        """Add a gauge for the size of the prefix cache."""
        self._gauge("kept_cache_bytes", "Bytes of keys and values kept from earlier requests.", lambda: kept.nbytes)

    def count(self, reply: Reply) -> None:
        """Add a finished reply's figures."""
        self.prompt_tokens.inc(reply.statistics.prompt_tokens)
        self.cached_tokens.inc(reply.cached_tokens)
        self.new_tokens.inc(reply.statistics.new_tokens)
        self.denoising_steps.inc(sum(reply.statistics.denoising_steps))
        self.unsettled.inc(reply.unsettled)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"mlx_diffgemma_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, *labels: str) -> Histogram:
        return Histogram(f"mlx_diffgemma_{name}", what, labels, registry=self.registry, buckets=_SECONDS)

    def _gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        Gauge(f"mlx_diffgemma_{name}", what, registry=self.registry).set_function(value)


class _Passes(Collector):
    """The engine's own counters. Rows divided by passes is the average batch size."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters

    def collect(self) -> Iterator[Metric]:
        for name, what, value in (
            ("denoising_passes", "Passes of the model that denoised canvases.", self.counters.denoising_passes),
            ("denoising_rows", "Canvases in all denoising passes.", self.counters.denoising_rows),
            ("encoded_tokens", "Tokens encoded or scored, in prompts and replies.", self.counters.encoded_tokens),
            ("seen_images", "Images and frames that went through the vision tower.", self.counters.seen_images),
            ("device_seconds", "Seconds that the model has computed.", self.counters.device_seconds),
        ):
            yield CounterMetricFamily(f"mlx_diffgemma_{name}", what, value=value)


class _DroppedLines(Collector):
    def __init__(self, dropped: Callable[[], float]) -> None:
        self.dropped = dropped

    def collect(self) -> Iterator[Metric]:
        yield CounterMetricFamily("mlx_diffgemma_log_lines_dropped", "Log lines that nobody read in time.", value=self.dropped())
