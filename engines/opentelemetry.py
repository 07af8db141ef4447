"""A span of OpenTelemetry for every call of a session: `load(path, on_call=spans())`."""

from typing import TYPE_CHECKING

from tnm_pipeline.engines.calls import Call, Observer
from tnm_pipeline.engines.errors import EnvironmentLacks

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer


def spans(tracer: "Tracer | None" = None) -> Observer:
    """An observer that records calls as spans named `tnm.run`, children of the caller's current span.

    They have the attributes `tnm.artifact`, `tnm.backend`, `tnm.queue_seconds`, `tnm.run_seconds` and `tnm.joined`, and
    the error of a call that got no answer.

    Args:
        tracer: Who makes the spans; None: the global provider's, looked up at the first call.

    Raises:
        EnvironmentLacks: `opentelemetry-api` is not installed.
    """
    try:
        from opentelemetry import trace
    except ImportError as error:
        raise EnvironmentLacks(
            "opentelemetry-api is not installed: run `pip install 'tnm-pipeline[observe]'`"
        ) from error
    maker = tracer or trace.get_tracer("tnm_pipeline.engines")

    def observe(call: Call) -> None:
        attributes: dict[str, str | float] = {
            "tnm.artifact": call.artifact,
            "tnm.backend": call.backend,
            "tnm.queue_seconds": call.queue,
            "tnm.run_seconds": call.run,
            "tnm.joined": call.joined,
        }
        span = maker.start_span("tnm.run", start_time=call.started, attributes=attributes)
        if call.error is not None:
            span.record_exception(call.error)
            span.set_status(trace.Status(trace.StatusCode.ERROR, type(call.error).__name__))
        span.end(call.started + int((call.queue + call.run) * 1e9))

    return observe
