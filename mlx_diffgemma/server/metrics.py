"""What a server counts, for Prometheus."""

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
    """The figures of one server, in a registry of its own.

    In ``requests`` a status is that of the answer, but for 499, of which the client has left, and streams that ended in an error,
    which have its status.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "Requests answered.", "route", "status")
        self.duration = self._histogram("request_duration_seconds", "From a request to the end of its answer.", "route")
        self.first_text = self._histogram(
            "time_to_first_text_seconds", "From a request to the first text of its answer.", "route"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, once a choice.")
        self.cached_tokens = self._counter("cached_prompt_tokens", "Those of them that a kept cache held.")
        self.new_tokens = self._counter("new_tokens", "Tokens written.")
        self.denoising_steps = self._counter("denoising_steps", "Denoising steps of single canvases.")
        self.unsettled = self._counter("unsettled_tokens", "Tokens shown as settled and then changed: 0 where the rule is sound.")
        self.cancellations = self._counter("cancellations", "Requests whose client left before the end of the answer.")
        self._gauge("requests_running", "Requests that the engine works on.", lambda: engine.running)
        self._gauge("requests_waiting", "Requests that wait for their turn.", lambda: engine.waiting)
        self.registry.register(_Passes(engine.counters))

    def watch(self, kept: PrefixCache) -> None:
        """Tell the size of what is kept from earlier requests."""
        self._gauge("kept_cache_bytes", "Keys and values kept from earlier requests.", lambda: kept.nbytes)

    def count(self, reply: Reply) -> None:
        """Add a finished reply's figures."""
        self.prompt_tokens.inc(reply.statistics.prompt_tokens)
        self.cached_tokens.inc(reply.cached_tokens)
        self.new_tokens.inc(reply.statistics.new_tokens)
        self.denoising_steps.inc(sum(reply.statistics.denoising_steps))
        self.unsettled.inc(reply.unsettled)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"mlx_diffgemma_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str, *labels: str) -> Histogram:
        return Histogram(f"mlx_diffgemma_{name}", what, labels, registry=self.registry, buckets=_SECONDS)

    def _gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        Gauge(f"mlx_diffgemma_{name}", what, registry=self.registry).set_function(value)


class _Passes(Collector):
    """What the engine counts itself; rows over passes says how much is batched."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters

    def collect(self) -> Iterator[Metric]:
        for name, what, value in (
            ("denoising_passes", "Passes over the model in which canvases were denoised.", self.counters.denoising_passes),
            ("denoising_rows", "Canvases in all those passes.", self.counters.denoising_rows),
            ("encoded_tokens", "Tokens that were encoded, in prompts and in answers.", self.counters.encoded_tokens),
            ("device_seconds", "Time that the model has computed.", self.counters.device_seconds),
        ):
            yield CounterMetricFamily(f"mlx_diffgemma_{name}", what, value=value)
