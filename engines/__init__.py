"""Production inference: load a verified artifact and run it. Imports neither torch nor a sibling package."""

from tnm_pipeline.engines.artifact import verify_artifact, write_manifest
from tnm_pipeline.engines.errors import (
    ArtifactRejected,
    DeadlineExceeded,
    DeviceOutOfMemory,
    EnvironmentLacks,
    FeedError,
    Overloaded,
    RunFailed,
    SessionClosed,
    SignatureRejected,
)
from tnm_pipeline.engines.limits import Limits
from tnm_pipeline.engines.manifest import Manifest, TensorSpec
from tnm_pipeline.engines.session import Session, load

__all__ = [
    "ArtifactRejected",
    "DeadlineExceeded",
    "DeviceOutOfMemory",
    "EnvironmentLacks",
    "FeedError",
    "Limits",
    "Manifest",
    "Overloaded",
    "RunFailed",
    "Session",
    "SessionClosed",
    "SignatureRejected",
    "TensorSpec",
    "load",
    "verify_artifact",
    "write_manifest",
]
