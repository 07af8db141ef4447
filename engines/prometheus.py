"""The metrics of sessions for Prometheus, through `prometheus-client`."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.engines.metrics import Distribution
from tnm_pipeline.engines.session import Session

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric


class SessionCollector:
    """Reads the metrics of a session whenever Prometheus asks; every sample has the label `session`.

    Counters `tnm_session_answered_total`, `tnm_session_errors_total` (label `error`), `tnm_session_runs_total`,
    `tnm_session_reloads_total`; gauges `tnm_session_waiting`, `tnm_session_running`, `tnm_session_fallback` (1 after a
    fallback, label `reason`); summaries `tnm_session_queue_seconds` and `tnm_session_run_seconds` with the quantiles
    .5, .95 and .99. What each of them means is said in `Metrics`.

    Args:
        session: Whose metrics.
        name: The value of the label.
    """

    def __init__(self, session: Session, name: str) -> None:
        self._session = session
        self._name = name

    def collect(self) -> Iterator["Metric"]:
        """What `prometheus_client` calls."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        metrics, name = self._session.metrics(), self._name
        for what, value, meaning in (
            ("answered", metrics.answered, "Calls that got their answer"),
            ("runs", metrics.runs, "Times that the network ran"),
            ("reloads", metrics.reloads, "Artifacts swapped in"),
        ):
            counter = CounterMetricFamily(f"tnm_session_{what}", meaning, labels=["session"])
            counter.add_metric([name], value)
            yield counter
        errors = CounterMetricFamily(
            "tnm_session_errors", "Calls that got no answer, by error class", labels=["session", "error"]
        )
        for error, count in sorted(metrics.errors.items()):
            errors.add_metric([name, error], count)
        yield errors
        for what, value, meaning in (
            ("waiting", metrics.waiting, "Calls in the queue"),
            ("running", metrics.running, "Calls under way"),
        ):
            gauge = GaugeMetricFamily(f"tnm_session_{what}", meaning, labels=["session"])
            gauge.add_metric([name], value)
            yield gauge
        fallback = GaugeMetricFamily(
            "tnm_session_fallback", "1 where another artifact answers than was asked for", labels=["session", "reason"]
        )
        fallback.add_metric([name, metrics.fallback_reason or ""], float(metrics.fallback_reason is not None))
        yield fallback
        yield _summary("queue", "Seconds in the queue", name, metrics.queue)
        yield _summary("run", "Seconds of a run, waiting for a context included", name, metrics.run)


def register(session: Session, name: str, registry: "CollectorRegistry | None" = None) -> SessionCollector:
    """Let Prometheus see a session.

    Args:
        session: Whose metrics.
        name: The value of the label `session`: one for each session of a process.
        registry: Where; None: the default one of `prometheus_client`.

    Returns:
        What was registered, for `registry.unregister`.

    Raises:
        EnvironmentLacks: `prometheus_client` is not installed.
    """
    try:
        from prometheus_client import REGISTRY
    except ImportError as error:
        raise EnvironmentLacks(
            "prometheus_client is not installed: run `pip install 'tnm-pipeline[observe]'`"
        ) from error
    collector = SessionCollector(session, name)
    (registry or REGISTRY).register(collector)
    return collector


def _summary(what: str, meaning: str, name: str, times: Distribution) -> "Metric":
    from prometheus_client import Metric

    full = f"tnm_session_{what}_seconds"
    summary = Metric(full, meaning, "summary")
    for quantile, seconds in (("0.5", times.p50), ("0.95", times.p95), ("0.99", times.p99)):
        summary.add_sample(full, {"session": name, "quantile": quantile}, seconds)
    summary.add_sample(f"{full}_count", {"session": name}, times.count)
    summary.add_sample(f"{full}_sum", {"session": name}, times.total)
    return summary
