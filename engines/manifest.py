"""The facts that stand beside an artifact, and their JSON form.

The manifest's own digest catches edits and damage, not an attacker who can rewrite manifest and artifact: it is a
checksum. A signature (`engines.signature`) is what such an attacker cannot make.

Versions. A manifest states a schema. Schema 1 is the fields of `Manifest`, all of them and no others. What a reader of
schema 1 may carry without understanding goes into `provenance` and `sparsity`, whose keys are free, and needs no new
schema. Anything that a reader has to know is a new one: another field, another meaning, another value of `backend`,
`precision` or a dtype. A release writes its newest schema and reads that and all older ones; a newer one is refused,
naming both. See docs/decisions/0018-manifest.md.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields

from tnm_pipeline.engines import decode, strict_json
from tnm_pipeline.engines.errors import ArtifactRejected
from tnm_pipeline.engines.filenames import check_file_name, check_relative_path
from tnm_pipeline.engines.tensors import Ranges, TensorSpec, check_ranges, read_ranges, tensor_spec

__all__ = ["BACKENDS", "PRECISIONS", "SCHEMA", "ExternalFile", "Manifest", "Ranges", "TensorSpec"]

SCHEMA = 1
BACKENDS = ("onnxruntime", "tensorrt", "tensorrt_rtx")
PRECISIONS = ("fp32", "fp16", "bf16")
HARDWARE = (None, "ampere_plus", "same_compute_capability")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COMPUTE_CAPABILITY = re.compile(r"[1-9][0-9]*\.[0-9]")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+!_-]*")  # complaints put it into a command to be copied


@dataclass(frozen=True)
class ExternalFile:
    """A file beside an ONNX artifact that holds some of its weights.

    Attributes:
        name: File name, without a folder.
        sha256: Hex digest of its bytes.
        bytes: Its size.

    Raises:
        ArtifactRejected: A value is outside what this schema allows.
    """

    name: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        _check_file(self.name, "an external file", self.sha256, self.bytes)


@dataclass(frozen=True)
class Manifest:
    """What is known about one artifact, as written by the machine that built it.

    Attributes:
        artifact: File name of the artifact, without a folder.
        sha256: Hex digest of the artifact's bytes.
        bytes: Size of the artifact.
        backend: One of `BACKENDS`: the runtime that executes it.
        backend_version: Version of the package that wrote it (of `onnx` for an ONNX artifact).
        precision: One of `PRECISIONS`.
        inputs: Inputs in graph order.
        outputs: Outputs in graph order.
        source_onnx: The ONNX file a plan was built from, relative to the manifest's folder (`../` is fine);
            None for an ONNX artifact.
        source_sha256: Hex digest of that file; None for an ONNX artifact.
        sparse_weights_flag: Whether the builder was allowed sparse tactics, not whether it picked one; None
            for an ONNX artifact.
        compute_capabilities: Those of the GPUs the plan runs on (`("8.0", "8.9")`); for `tensorrt` that of
            the building GPU; empty for an ONNX artifact.
        gpu: Name of the building machine's GPU, None without one.
        driver: The newest CUDA version of its driver, None without one. For people: it is not compared.
        sparsity: The summary of the sparsity report, and of a plan `verdict`, what became of each layer; any JSON
            object.
        profiles: The optimisation profiles of a plan in their order: a call is answered by one whose ranges hold all
            its sizes. Empty for an ONNX artifact, and for a plan of fixed sizes.
        external: Files beside an ONNX artifact that hold its larger weights; empty where all are inside.
        operating_system: The one that a plan runs on (`"linux"`, `"windows"`); None where it runs on every one that
            its runtime supports, as ONNX files and TensorRT-RTX plans do.
        cpu_architecture: Likewise that of the CPU (`"x86_64"`, `"aarch64"`).
        version_compatible: Whether later releases of `tensorrt` than `backend_version` run the plan too; it then has
            code for the CPU in it.
        hardware_compatible: Which other GPUs than that of the building machine run a plan of `tensorrt`:
            `"ampere_plus"`: all of compute capability 8.0 and later; `"same_compute_capability"`: those of the same
            one; None: it was tuned for that GPU.
        provenance: Where the artifact comes from; any JSON object, which no reader has to understand. Our exporter
            states `packages` (name -> version), and `checkpoint_sha256` and `settings_sha256` where it knows them.

    Raises:
        ArtifactRejected: A value is outside what this schema allows.
    """

    artifact: str
    sha256: str
    bytes: int
    backend: str
    backend_version: str
    precision: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    source_onnx: str | None
    source_sha256: str | None
    sparse_weights_flag: bool | None
    compute_capabilities: tuple[str, ...]
    gpu: str | None
    driver: str | None
    sparsity: Mapping[str, object]
    profiles: tuple[Ranges, ...] = ()
    external: tuple[ExternalFile, ...] = ()
    operating_system: str | None = None
    cpu_architecture: str | None = None
    version_compatible: bool = False
    hardware_compatible: str | None = None
    provenance: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_file(self.artifact, "artifact", self.sha256, self.bytes)
        decode.require(self.backend in BACKENDS, f"backend is {self.backend!r}; known: {', '.join(BACKENDS)}")
        decode.require(
            bool(_VERSION.fullmatch(self.backend_version)), f"backend_version is no version: {self.backend_version!r}"
        )
        decode.require(self.precision in PRECISIONS, f"precision is {self.precision!r}; known: {', '.join(PRECISIONS)}")
        for capability in self.compute_capabilities:
            decode.require(
                bool(_COMPUTE_CAPABILITY.fullmatch(capability)),
                f"compute capability {capability!r} is not like '8.9'",
            )
        for index, ranges in enumerate(self.profiles):
            check_ranges(ranges, f"profile {index}")
            unknown = sorted(set(ranges).difference(*(spec.shape for spec in self.inputs)))
            decode.require(not unknown, f"profile {index} has a range for {decode.shown(unknown)}, which no input has")
        for side, specs in (("inputs", self.inputs), ("outputs", self.outputs)):
            names = [spec.name for spec in specs]
            decode.require(
                len(set(names)) == len(names) > 0,
                f"{side} must be one or more different names, not {decode.shown(names)}",
            )
        beside = [file.name for file in self.external]
        decode.require(len(set(beside)) == len(beside), f"external lists a file twice: {decode.shown(beside)}")
        if self.backend == "onnxruntime":
            decode.require(not self.compute_capabilities, "an ONNX artifact has no compute capabilities")
            decode.require(not self.profiles, "an ONNX artifact has no profiles")
            decode.require(self.operating_system is None, "an ONNX artifact runs on every operating system")
        else:
            decode.require(not self.external, f"a {self.backend} plan has no external files")
            decode.require(bool(self.compute_capabilities), f"a {self.backend} plan lists no compute capability")
        decode.require(
            self.hardware_compatible in HARDWARE,
            f"hardware_compatible is {self.hardware_compatible!r}; known: {', '.join(map(str, HARDWARE))}",
        )
        decode.require(
            self.backend == "tensorrt" or not (self.version_compatible or self.hardware_compatible),
            f"only tensorrt builds plans for other releases or GPUs, not {self.backend}",
        )
        decode.require(
            (self.operating_system is None) == (self.cpu_architecture is None),
            "operating_system and cpu_architecture go together",
        )
        decode.require("" not in (self.operating_system, self.cpu_architecture), "a machine is an empty text")
        decode.require(
            (self.source_onnx is None) == (self.source_sha256 is None),
            "source_onnx and source_sha256 go together",
        )
        if self.source_onnx is not None and self.source_sha256 is not None:
            check_relative_path(self.source_onnx, "source_onnx")
            decode.require(
                bool(_SHA256.fullmatch(self.source_sha256)),
                f"source_sha256 is not 64 hex digits: {self.source_sha256!r}",
            )

    def to_json(self) -> str:
        """Canonical JSON with `schema` and `digest`: equal manifests give equal bytes (no timestamps)."""
        record = {**asdict(self), "schema": SCHEMA}
        return strict_json.write({**record, "digest": _digest(record)})

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Parse what `to_json` wrote.

        Args:
            text: The content of a manifest file.

        Returns:
            The manifest; `Manifest.from_json(m.to_json()) == m`.

        Raises:
            ArtifactRejected: Not what `strict_json.read` accepts, another schema, a wrong digest, unknown or missing
                keys, or wrong types.
        """
        record = decode.mapping(strict_json.read(text), "the manifest")
        _check_schema(record.get("schema"))
        decode.exact_keys(record, [*(f.name for f in fields(Manifest)), "schema", "digest"], "the manifest")
        stated = decode.text(record.pop("digest"), "digest")
        actual = _digest(record)
        decode.require(
            stated == actual,
            f"edited since it was written: it states digest {stated}, its content gives {actual}",
        )
        return Manifest(
            artifact=decode.text(record["artifact"], "artifact"),
            sha256=decode.text(record["sha256"], "sha256"),
            bytes=decode.whole(record["bytes"], "bytes"),
            backend=decode.text(record["backend"], "backend"),
            backend_version=decode.text(record["backend_version"], "backend_version"),
            precision=decode.text(record["precision"], "precision"),
            inputs=decode.sequence(record["inputs"], "inputs", tensor_spec),
            outputs=decode.sequence(record["outputs"], "outputs", tensor_spec),
            source_onnx=decode.optional(record["source_onnx"], "source_onnx", decode.text),
            source_sha256=decode.optional(record["source_sha256"], "source_sha256", decode.text),
            sparse_weights_flag=decode.optional(record["sparse_weights_flag"], "sparse_weights_flag", decode.truth),
            compute_capabilities=decode.sequence(record["compute_capabilities"], "compute_capabilities", decode.text),
            gpu=decode.optional(record["gpu"], "gpu", decode.text),
            driver=decode.optional(record["driver"], "driver", decode.text),
            sparsity=decode.mapping(record["sparsity"], "sparsity"),
            profiles=decode.sequence(record["profiles"], "profiles", read_ranges),
            external=decode.sequence(record["external"], "external", _external_file),
            operating_system=decode.optional(record["operating_system"], "operating_system", decode.text),
            cpu_architecture=decode.optional(record["cpu_architecture"], "cpu_architecture", decode.text),
            version_compatible=decode.truth(record["version_compatible"], "version_compatible"),
            hardware_compatible=decode.optional(record["hardware_compatible"], "hardware_compatible", decode.text),
            provenance=decode.mapping(record["provenance"], "provenance"),
        )


def _check_schema(schema: object) -> None:
    if isinstance(schema, int) and not isinstance(schema, bool):
        if schema == SCHEMA:
            return
        if schema > SCHEMA:
            raise ArtifactRejected(
                f"schema is {schema}; this version reads schema {SCHEMA}: run `pip install --upgrade tnm-pipeline`, or "
                "export the artifact again with the version that is installed here"
            )
    raise ArtifactRejected(f"schema is {decode.shown(schema)}; this version reads schema {SCHEMA}, the first there was")


def _check_file(name: str, what: str, sha256: str, size: int) -> None:
    check_file_name(name, what)
    decode.require(bool(_SHA256.fullmatch(sha256)), f"sha256 is not 64 hex digits: {sha256!r}")
    decode.require(size >= 0, f"bytes is {size}")


def _external_file(value: object, key: str) -> ExternalFile:
    record = decode.mapping(value, key)
    decode.exact_keys(record, [f.name for f in fields(ExternalFile)], key)
    return ExternalFile(
        name=decode.text(record["name"], f"{key}.name"),
        sha256=decode.text(record["sha256"], f"{key}.sha256"),
        bytes=decode.whole(record["bytes"], f"{key}.bytes"),
    )


def _digest(record: Mapping[str, object]) -> str:
    return hashlib.sha256(strict_json.write(record).encode()).hexdigest()
