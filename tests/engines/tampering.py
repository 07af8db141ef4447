"""Ways to tamper with an artifact. Each changes files in a copy of `good/`, a folder of signed artifacts."""

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np

from tnm_pipeline.engines import sign_artifact
from tnm_pipeline.engines.artifact import manifest_path
from tnm_pipeline.engines.signature import signature_path

ARTIFACTS = ("export/model.fp32.onnx", "export/large.onnx", "build/model.fp16.plan")
OTHER = "export/other.onnx"  # signed by the same key
STRANGER = "stranger/signing-key.pem"

Rng: TypeAlias = np.random.Generator
Tampering: TypeAlias = Callable[[Path, Rng], object]
T = TypeVar("T")


def pick(rng: Rng, choices: Sequence[T]) -> T:
    return choices[int(rng.integers(len(choices)))]


# What is done to a file, whichever it is.


def flip(path: Path, rng: Rng) -> None:
    content = bytearray(path.read_bytes())
    for place in rng.choice(8 * len(content), size=int(rng.integers(1, 9)), replace=False):
        content[place // 8] ^= 1 << place % 8
    path.write_bytes(content)


def truncate(path: Path, rng: Rng) -> None:
    path.write_bytes(path.read_bytes()[: int(rng.integers(path.stat().st_size))])


def extend(path: Path, rng: Rng) -> None:
    path.write_bytes(path.read_bytes() + rng.bytes(int(rng.integers(1, 100))))


def replace_block(path: Path, rng: Rng) -> None:
    content = bytearray(path.read_bytes())
    start = int(rng.integers(len(content)))
    content[start : start + 64] = rng.bytes(64)
    path.write_bytes(content)


def noise(path: Path, rng: Rng) -> None:
    path.write_bytes(rng.bytes(int(rng.integers(2000))))


def remove(path: Path, rng: Rng) -> None:
    path.unlink()


def folder(path: Path, rng: Rng) -> None:
    path.unlink()
    path.mkdir()


def link(path: Path, rng: Rng) -> None:
    """To nothing, to itself, to devices, to a folder, to another artifact."""
    path.unlink()
    path.symlink_to(pick(rng, ["nowhere", path.name, "/dev/zero", "/dev/null", ".", "../export/other.onnx"]))


FILE: list[Tampering] = [flip, truncate, extend, replace_block, noise, remove, folder, link]


# What is done to a manifest's text.


def edit(path: Path, change: Callable[[dict[str, Any]], object], *, reseal: bool) -> None:
    """Change fields; with `reseal` the digest fits afterwards."""
    record = json.loads(path.read_text())
    digest = record.pop("digest")
    change(record)
    if reseal:
        digest = hashlib.sha256((json.dumps(record, sort_keys=True, indent=2) + "\n").encode()).hexdigest()
    path.write_text(json.dumps({**record, "digest": digest}, sort_keys=True, indent=2) + "\n")


NAMES = ["../x", "/etc/passwd", "..\\x", "C:x", "a/b", "NUL", "com1.onnx", "x\0", "x\n", "", ".", "..", "x\u202e", "x."]
NAMES += ["\uff0e\uff0e\uff0fx", "\u2100", "\ud800", "a" * 300, "x:y", "CON.plan", "model.fp32.onn\u0445"]
PATHS = [
    *(name for name in NAMES[1:-1] if name != "a/b"),
    "a//b",
    "./x",
    "a/../b",
    "../" * 2000,
    "..",
    "//host/x",
    "\\\\host\\x",
    "~/../../x/",
]
HUGE = [10**30, -(10**30), 2**63, 1e999, -1, 10**4000]
WRONG: list[object] = [None, True, 1, -1, 0.5, "", "x", [], {}, [[]], [None], {"a": 1}]
DEEP = "[" * 10_000 + "]" * 10_000
NEEDED = ["artifact", "sha256", "bytes", "backend", "backend_version", "precision", "inputs", "outputs", "sparsity"]


def edit_unsealed(path: Path, rng: Rng) -> None:
    key = pick(rng, [*NEEDED, "gpu", "driver", "provenance", "profiles", "external", "operating_system", "schema"])
    edit(path, lambda record: record.update({key: f"edited {rng.integers(10**9)}"}), reseal=False)


def schema(path: Path, rng: Rng) -> None:
    value = pick(rng, [0, 2, 3, 999, -1, "1", 1.0, True, None, [1], 10**30])
    edit(path, lambda record: record.update(schema=value), reseal=True)


def name_trick(path: Path, rng: Rng) -> None:
    edit(path, lambda record: record.update(artifact=pick(rng, NAMES)), reseal=True)


def path_trick(path: Path, rng: Rng) -> None:
    change = {"source_onnx": pick(rng, PATHS), "source_sha256": "0" * 64}
    edit(path, lambda record: record.update(change), reseal=True)


def external_trick(path: Path, rng: Rng) -> None:
    """A file elsewhere, with the hash and size it has."""
    secret = path.parent.parent / "secret"
    secret.write_bytes(b"not yours")
    stated = {"sha256": hashlib.sha256(b"not yours").hexdigest(), "bytes": 9}
    name = pick(rng, ["../secret", str(secret), "..\\secret", *NAMES])
    edit(path, lambda record: record.update(external=[{"name": name, **stated}]), reseal=True)


def huge_number(path: Path, rng: Rng) -> None:
    value = pick(rng, HUGE)

    def change(record: dict[str, Any]) -> None:
        place = int(rng.integers(4))
        if place == 0:
            record["bytes"] = value
        elif place == 1:
            record["inputs"][0]["shape"] = [value]
        elif place == 2:
            record["inputs"][0].update(shape=["batch"], ranges={"batch": [value, value, 1]})
        else:
            record["provenance"] = {"value": value if value != -1 else 10**25}

    edit(path, change, reseal=True)


def wrong_type(path: Path, rng: Rng) -> None:
    key = pick(rng, NEEDED[:-1])
    # what is wrong for each of these fields; 1 and "x" are not for all
    values = [value for value in WRONG if value is not None and (value != "x" or key != "backend_version")]
    if key == "bytes":
        values = [None, True, 0.5, "", "x", [], {}]
    elif key == "backend_version":
        values = [None, True, 1, "", [], {}, "1'; true '"]
    edit(path, lambda record: record.update({key: pick(rng, values)}), reseal=True)


def keys(path: Path, rng: Rng) -> None:
    if rng.integers(2):
        edit(path, lambda record: record.pop(pick(rng, NEEDED)), reseal=True)
    else:
        edit(path, lambda record: record.update({f"extra {rng.integers(99)}": None}), reseal=True)


def raw_text(path: Path, rng: Rng) -> None:
    """What a parser may stumble over."""
    text = path.read_text()
    broken = [
        text.replace("{", '{"schema": 1, ', 1),
        text.replace('"provenance": {', '"provenance": {"x": NaN, '),
        text.replace('"provenance": {', '"provenance": {"x": -Infinity, '),
        text.replace('"provenance": {', '"provenance": {"x": 1e999, '),
        text.replace('"provenance": {', f'"provenance": {{"x": {"9" * 5000}, '),
        text.replace('"provenance": {', f'"provenance": {{"x": {DEEP}, '),
        text.replace('"provenance": {', f'"provenance": {{"x": {DEEP[9700:10300]}, '),
        text.replace('"provenance": {', '"provenance": {"\\ud800": 1, '),
        text.replace('"provenance": {', '"provenance": {"x": "\\udfff", '),
        text.replace('"schema": 1', '"schema": 1e0'),
        text + text,
        text + "x",
        "\ufeff" + text,
        DEEP,
        "[]",
        "null",
        "{}",
        '"' + "x" * 10_000 + '"',
        "\0" * 100,
    ]
    path.write_text(pick(rng, broken))


def encoding(path: Path, rng: Rng) -> None:
    content = path.read_text()
    forms = [content.encode("utf-16"), content.encode("utf-32"), b"\xff" + content.encode(), content.encode() + b"\xc0"]
    path.write_bytes(pick(rng, forms))


def oversize(path: Path, rng: Rng) -> None:
    with path.open("a") as file:
        file.write(" " * (8 << 20))


MANIFEST: list[Tampering] = [
    *FILE,
    edit_unsealed,
    schema,
    name_trick,
    path_trick,
    external_trick,
    huge_number,
    wrong_type,
    keys,
    raw_text,
    encoding,
]


# What is done to an artifact as a whole.


def swap_content(artifact: Path, rng: Rng) -> None:
    shutil.copyfile(artifact.parents[1] / OTHER, artifact)


def swap_manifest(artifact: Path, rng: Rng) -> None:
    shutil.copyfile(manifest_path(artifact.parents[1] / OTHER), manifest_path(artifact))


def swap_all(artifact: Path, rng: Rng) -> None:
    """Another signed artifact under this one's name."""
    other = artifact.parents[1] / OTHER
    for where in (Path, manifest_path, signature_path):
        shutil.copyfile(where(other), where(artifact))


def data(artifact: Path, rng: Rng) -> None:
    """The weights beside a graph."""
    weights = artifact.parents[1] / "export/large.onnx.data"
    if rng.integers(4):
        pick(rng, FILE)(weights, rng)
    else:
        shutil.copyfile(artifact.parents[1] / "export/other.data", weights)


def other_gpu(artifact: Path, rng: Rng) -> None:
    capability = pick(rng, ["7.5", "9.0", "10.0", "12.0", "99.9"])
    edit(manifest_path(artifact), lambda record: record.update(compute_capabilities=[capability]), reseal=True)


def other_machine(artifact: Path, rng: Rng) -> None:
    system, cpu = pick(rng, [("windows", "x86_64"), ("linux", "riscv64"), ("plan9", "mips")])
    change = {"operating_system": system, "cpu_architecture": cpu}
    edit(manifest_path(artifact), lambda record: record.update(change), reseal=True)


# Pairs that agree with each other: without a key nobody can tell them from the truth.


def forged_fact(artifact: Path, rng: Rng) -> None:
    changes: list[dict[str, object]] = [
        {"gpu": "NVIDIA H200"},
        {"driver": "CUDA 99.9"},
        {"sparsity": {"eligible": 10**6}},
        {"provenance": {"checkpoint_sha256": "0" * 64}},
        {"backend_version": "99.9"},
        {"precision": "bf16"},
    ]
    edit(manifest_path(artifact), lambda record: record.update(pick(rng, changes)), reseal=True)


def forged_content(artifact: Path, rng: Rng) -> None:
    flip(artifact, rng)
    content = artifact.read_bytes()
    change = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    edit(manifest_path(artifact), lambda record: record.update(change), reseal=True)


def forged_and_signed(artifact: Path, rng: Rng) -> None:
    forged_content(artifact, rng)
    sign_artifact(artifact, artifact.parents[2] / "keys" / STRANGER)


def reformatted(artifact: Path, rng: Rng) -> None:
    path = manifest_path(artifact)
    path.write_text(json.dumps(json.loads(path.read_text())))


def signature(artifact: Path, rng: Rng) -> None:
    pick(rng, FILE)(signature_path(artifact), rng)


def others_signature(artifact: Path, rng: Rng) -> None:
    shutil.copyfile(signature_path(artifact.parents[1] / OTHER), signature_path(artifact))


FORGED: list[Tampering] = [
    forged_fact,
    forged_content,
    forged_and_signed,
    reformatted,
    signature,
    others_signature,
]


def tamper(artifact: Path, number: int, rng: Rng) -> tuple[str, bool]:
    """Tamper once.

    Args:
        artifact: One of `ARTIFACTS` in a copy of `good/` that stands beside `keys/`.
        number: Decides among artifact, manifest, both, and pairs that agree.
        rng: Decides the rest.

    Returns:
        The kind, and whether artifact and manifest still agree.
    """
    kind = number % 10
    if kind < 3:
        change = pick(rng, FILE)
        change(artifact, rng)
        return f"artifact {change.__name__}", False
    if kind < 6:
        change = oversize if number % 500 == 3 else pick(rng, MANIFEST)
        change(manifest_path(artifact), rng)
        return f"manifest {change.__name__}", False
    if kind < 8:
        whole: list[Tampering] = [swap_content, swap_manifest, swap_all]
        whole += [data] * 3 if artifact.name == "large.onnx" else []
        whole += [other_gpu, other_machine] if artifact.suffix == ".plan" else []
        change = pick(rng, whole)
        change(artifact, rng)
        return change.__name__, False
    change = pick(rng, FORGED)
    change(artifact, rng)
    return change.__name__, True
