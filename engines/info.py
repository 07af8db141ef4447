"""What a session says of itself."""

from collections.abc import Mapping
from dataclasses import dataclass

from tnm_pipeline.engines.batching import Batching
from tnm_pipeline.engines.limits import Limits


@dataclass(frozen=True)
class SessionInfo:
    """The artifact that answers now, and how.

    Attributes:
        artifact: File name of what answers: after a fallback, of the source ONNX.
        sha256: Its hash, as checked when it was loaded.
        backend: `"onnxruntime"`, `"tensorrt"` or `"tensorrt_rtx"`.
        backend_version: The runtime's release here.
        device: `"cpu"` or `"cuda"`.
        why: Why this artifact and this runtime answer, in words.
        fallback_reason: Why the artifact that was asked for does not answer, None where it does.
        precision: `"fp32"`, `"fp16"` or `"bf16"`: of the weights.
        sparsity: What the manifest says of N:M: the pattern of each layer, violations, eligible layers, verdicts.
        sparse_weights_flag: Whether the plan's builder was allowed sparse tactics; None for an ONNX artifact.
        signed: Whether a trusted key signed the manifest; False where no key was asked for.
        limits: Bounds of the session.
        batching: How calls are joined, None where they are not.
        runtime: How the runtime runs it: contexts, CUDA graphs kept and refused, providers; values that JSON has.
    """

    artifact: str
    sha256: str
    backend: str
    backend_version: str
    device: str
    why: str
    fallback_reason: str | None
    precision: str
    sparsity: Mapping[str, object]
    sparse_weights_flag: bool | None
    signed: bool
    limits: Limits
    batching: Batching | None
    runtime: Mapping[str, object]
