"""Serve an artifact over HTTP: `python examples/serve.py runs/demo/build/engine.plan 8000`.

POST /run takes {"inputs": {name: nested lists}, "timeout": seconds} and answers {"outputs": {name: nested lists}}.
POST /reload swaps in the file that replaced the artifact. GET /metrics is for Prometheus, GET /health for a balancer.
Needs `pip install fastapi uvicorn 'tnm-pipeline[observe]'`.
"""

import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client import generate_latest
from pydantic import BaseModel, Field

from tnm_pipeline.engines import ArtifactRejected, DeadlineExceeded, DeviceOutOfMemory, Overloaded, SessionClosed, load
from tnm_pipeline.engines.prometheus import register

STATUS = {
    **dict.fromkeys((ValueError, TypeError, OverflowError), 422),
    **dict.fromkeys((Overloaded, SessionClosed, DeviceOutOfMemory), 503),
    DeadlineExceeded: 504,
    ArtifactRejected: 409,
}
session = load(sys.argv[1], fallback="onnxruntime", finite=True)
register(session, name="main")


class Call(BaseModel):
    """What /run takes."""

    inputs: dict[str, Any]
    timeout: float | None = Field(None, gt=0, allow_inf_nan=False)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Let the last calls end."""
    with session:
        yield


async def answer(_: Request, error: Exception) -> JSONResponse:
    """An error of a session as a status of HTTP."""
    status = next(STATUS[kind] for kind in type(error).__mro__ if kind in STATUS)
    return JSONResponse({"error": str(error)}, status)


app = FastAPI(lifespan=lifespan, exception_handlers=dict.fromkeys(STATUS, answer))


@app.post("/run")
async def run(call: Call) -> dict[str, Any]:
    """Answer one call; many may be under way."""
    dtypes = {spec.name: spec.dtype for spec in session.inputs}
    feeds = {name: np.asarray(value, dtypes.get(name)) for name, value in call.inputs.items()}
    answers = await session.run_async(feeds, timeout=call.timeout)
    return {"outputs": {name: array.tolist() for name, array in answers.items()}}


@app.post("/reload")
def reload() -> dict[str, str]:
    """Swap in the artifact that now lies at the path; if it is refused, the old one goes on."""
    session.reload()
    return health()


@app.get("/health")
def health() -> dict[str, str]:
    """Which artifact answers, and why."""
    return {"artifact": session.info.artifact, "sha256": session.info.sha256, "why": session.info.why}


@app.get("/metrics")
def metrics() -> PlainTextResponse:
    """Counts and times, as Prometheus reads them."""
    return PlainTextResponse(generate_latest())


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]))
