"""The metrics of sessions for Prometheus, through `prometheus-client`."""

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tnm_pipeline.engines.errors import EnvironmentLacks
from tnm_pipeline.engines.metrics import Distribution, Metrics
from tnm_pipeline.engines.session import Session

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry, Metric


class SessionCollector:
    """Reads the metrics of sessions whenever Prometheus asks; every sample has the label `session`. Made by `register`.

    Counters `tnm_session_answered_total`, `tnm_session_errors_total` (label `error`), `tnm_session_runs_total`,
    `tnm_session_repeated_total`, `tnm_session_reloads_total`; gauges `tnm_session_waiting`, `tnm_session_running`,
    `tnm_session_fallback` (1 after a fallback, label `reason`); histograms `tnm_session_queue_seconds` and
    `tnm_session_run_seconds`. What each of them means is said in `Metrics`. Closed sessions are left out.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}

    def add(self, name: str, session: Session) -> None:
        """See `register`."""
        known = self._sessions.get(name)
        if known is not None and not known.closed:
            raise ValueError(f"a session is registered as {name!r} already: give another name")
        self._sessions[name] = session

    def describe(self) -> "list[Metric]":
        """The families, without samples: what a registry compares with those of others."""
        return list(_families().values())

    def collect(self) -> "Iterator[Metric]":
        """What `prometheus_client` calls."""
        families = _families()
        for name, session in list(self._sessions.items()):
            if not session.closed:
                _fill(families, name, session.metrics())
        yield from families.values()


def register(session: Session, name: str, registry: "CollectorRegistry | None" = None) -> None:
    """Let Prometheus see a session, until it is closed.

    Args:
        session: Whose metrics.
        name: The value of the label `session`.
        registry: Where; None: the default one of `prometheus_client`.

    Raises:
        EnvironmentLacks: `prometheus_client` is not installed.
        ValueError: Another session that is not closed has this name there.
    """
    try:
        from prometheus_client import REGISTRY
    except ImportError as error:
        raise EnvironmentLacks(
            "prometheus_client is not installed: run `pip install 'tnm-pipeline[observe]'`"
        ) from error
    where = registry or REGISTRY
    with _registering:
        if where not in _collectors:
            _collectors[where] = SessionCollector()
            where.register(_collectors[where])
        _collectors[where].add(name, session)


_registering = threading.Lock()
_collectors: "WeakKeyDictionary[CollectorRegistry, SessionCollector]" = WeakKeyDictionary()
_COUNTERS = {
    "answered": "Calls that got their answer",
    "runs": "Times that the network ran",
    "repeated": "Joined runs that failed, after which each of their calls ran alone",
    "reloads": "Artifacts swapped in",
}
_GAUGES = {"waiting": "Calls in the queue", "running": "Runs under way"}
_TIMES = {"queue": "Seconds in the queue", "run": "Seconds of a run, waiting for a context included"}


def _families() -> "dict[str, Metric]":
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    label = ["session"]
    made: dict[str, Metric] = {
        what: CounterMetricFamily(f"tnm_session_{what}", meaning, labels=label) for what, meaning in _COUNTERS.items()
    }
    made["errors"] = CounterMetricFamily(
        "tnm_session_errors", "Calls that got no answer, by error class", labels=["session", "error"]
    )
    made |= {what: GaugeMetricFamily(f"tnm_session_{what}", meaning, labels=label) for what, meaning in _GAUGES.items()}
    made["fallback"] = GaugeMetricFamily(
        "tnm_session_fallback", "1 where another artifact answers than was asked for", labels=["session", "reason"]
    )
    made |= {
        what: HistogramMetricFamily(f"tnm_session_{what}_seconds", meaning, labels=label)
        for what, meaning in _TIMES.items()
    }
    return made


def _fill(families: "dict[str, Any]", name: str, metrics: Metrics) -> None:
    for what in (*_COUNTERS, *_GAUGES):
        families[what].add_metric([name], getattr(metrics, what))
    for error, count in sorted(metrics.errors.items()):
        families["errors"].add_metric([name, error], count)
    families["fallback"].add_metric([name, metrics.fallback_reason or ""], float(metrics.fallback_reason is not None))
    for what in _TIMES:
        times: Distribution = getattr(metrics, what)
        buckets = [(f"{bound:g}", count) for bound, count in times.buckets]
        families[what].add_metric([name], [*buckets, ("+Inf", times.count)], times.total)
