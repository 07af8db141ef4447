"""Production inference: load a verified artifact and run it. Imports neither torch nor a sibling package."""

from tnm_pipeline.engines.artifact import sign_artifact, verify_artifact, write_manifest
from tnm_pipeline.engines.batching import Batching
from tnm_pipeline.engines.calls import Call
from tnm_pipeline.engines.errors import (
    ArtifactRejected,
    DeadlineExceeded,
    DeviceOutOfMemory,
    EnvironmentLacks,
    FeedError,
    KeyRejected,
    Overloaded,
    RunFailed,
    SessionClosed,
    SignatureRejected,
)
from tnm_pipeline.engines.info import SessionInfo
from tnm_pipeline.engines.limits import Limits
from tnm_pipeline.engines.loader import load
from tnm_pipeline.engines.manifest import Manifest, TensorSpec
from tnm_pipeline.engines.metrics import Metrics
from tnm_pipeline.engines.session import Session

__all__ = [
    "ArtifactRejected",
    "Batching",
    "Call",
    "DeadlineExceeded",
    "DeviceOutOfMemory",
    "EnvironmentLacks",
    "FeedError",
    "KeyRejected",
    "Limits",
    "Manifest",
    "Metrics",
    "Overloaded",
    "RunFailed",
    "Session",
    "SessionClosed",
    "SessionInfo",
    "SignatureRejected",
    "TensorSpec",
    "load",
    "sign_artifact",
    "verify_artifact",
    "write_manifest",
]
