import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tnm_pipeline.engines import ArtifactRejected, Manifest, TensorSpec, strict_json, verify_artifact, write_manifest
from tnm_pipeline.engines.artifact import Content, manifest_path, read_verified, sha256_of
from tnm_pipeline.engines.manifest import PRECISIONS, ExternalFile
from tnm_pipeline.engines.tensors import DTYPES

Change: TypeAlias = Callable[[dict[str, Any]], object]


def resealed(text: str, change: Change) -> str:
    """The manifest `text` after `change`, with a digest that fits: what only a deeper check can refuse."""
    record = json.loads(text)
    del record["digest"]
    change(record)
    body = json.dumps(record, sort_keys=True, indent=2) + "\n"
    return json.dumps({**record, "digest": hashlib.sha256(body.encode()).hexdigest()})


@pytest.fixture
def manifest(model: Path) -> Manifest:
    return verify_artifact(model)


def test_json_round_trip_keeps_every_field(manifest: Manifest) -> None:
    full = dataclasses.replace(
        manifest,
        artifact="model.plan",
        backend="tensorrt",
        inputs=(TensorSpec("x", "int64", ("batch", 3, "tokens"), {"batch": (1, 4, 8), "tokens": (1, 128, 512)}),),
        source_onnx="../export/model.onnx",
        source_sha256="0" * 64,
        sparse_weights_flag=False,
        compute_capabilities=("8.0", "12.0"),
        gpu="NVIDIA A100",
        driver="13.0",
        operating_system="linux",
        cpu_architecture="x86_64",
        provenance={"packages": {"torch": "2.13.0"}, "checkpoint_sha256": "1" * 64, "later": [None, 0.5]},
    )
    assert Manifest.from_json(full.to_json()) == full


def test_equal_manifests_give_equal_bytes(manifest: Manifest) -> None:
    reordered = dataclasses.replace(manifest, sparsity=dict(reversed(list(manifest.sparsity.items()))))
    assert reordered.to_json() == manifest.to_json()


def test_digest_is_of_the_canonical_json_without_it(manifest: Manifest) -> None:
    record = json.loads(manifest.to_json())
    digest = record.pop("digest")
    assert digest == hashlib.sha256((json.dumps(record, sort_keys=True, indent=2) + "\n").encode()).hexdigest()


def test_sha256_and_bytes_are_those_of_the_file(model: Path, manifest: Manifest) -> None:
    assert manifest.sha256 == hashlib.sha256(model.read_bytes()).hexdigest() == sha256_of(model)
    assert manifest.bytes == len(model.read_bytes())
    assert read_verified(model) == Content(manifest, model.read_bytes(), {})


def test_every_single_character_edit_is_refused(manifest: Manifest) -> None:
    text = manifest.to_json()
    for place, old in enumerate(text):
        if old.isalnum():  # white space between tokens carries no fact
            with pytest.raises(ArtifactRejected):
                Manifest.from_json(text[:place] + ("0" if old != "0" else "1") + text[place + 1 :])


@pytest.mark.parametrize(
    "text", ["", "{", "null", "[]", '"text"', "{}", '{"schema": 1}', "[" * 100_000, "9" * 5_000, "NaN"]
)
def test_what_is_not_a_manifest_is_refused(text: str) -> None:
    with pytest.raises(ArtifactRejected):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda r: r.update(schema=2), "schema is 2"),
        (lambda r: r.update(schema=2), "reads schema 1: run `pip install --upgrade tnm-pipeline`, or export"),
        (lambda r: r.update(schema=0), "schema is 0; this version reads schema 1, the first"),
        (lambda r: r.update(schema=1.0), "schema is 1.0"),
        (lambda r: r.update(schema="1"), "schema is '1'"),
        (lambda r: r.update(schema=True), "schema is True"),
        (lambda r: r.pop("schema"), "schema is None"),
        (lambda r: r.update(signature="x"), r"unknown keys \['signature'\]"),
        (lambda r: r.pop("driver"), r"lacks the keys \['driver'\]"),
        (lambda r: r.update(bytes="12"), "bytes must be a whole number, not '12'"),
        (lambda r: r.update(bytes=True), "bytes must be a whole number"),
        (lambda r: r.update(bytes=-1), "bytes is -1"),
        (lambda r: r.update(sha256="ABC"), "not 64 hex digits"),
        (lambda r: r.update(backend="openvino"), "known: onnxruntime, tensorrt, tensorrt_rtx"),
        (lambda r: r.update(precision="int8"), "known: fp32, fp16"),
        (lambda r: r.update(artifact="../model.onnx"), "bare file name"),
        (lambda r: r.update(artifact=".."), "bare file name"),
        (lambda r: r.update(gpu=3), "gpu must be a string"),
        (lambda r: r.update(inputs=[]), "inputs must be one or more"),
        (lambda r: r.update(inputs=r["inputs"] * 2), "different names"),
        (lambda r: r.update(compute_capabilities=["8.0"]), "no compute capabilities"),
        (lambda r: r.update(sparse_weights_flag=1), "true or false"),
        (lambda r: r["inputs"][0].update(dtype="object"), "dtype 'object'"),
        (lambda r: r["inputs"][0].update(shape=[-1, 8]), "dimension -1"),
        (lambda r: r["inputs"][0].update(shape=["", 8]), "dimension ''"),
        (lambda r: r["inputs"][0].update(ranges={"batch": [1, 4]}), r"\[min, opt, max\]"),
        (lambda r: r["inputs"][0].update(ranges={"batch": [4, 1, 8]}), "min <= opt <= max"),
        (lambda r: r["inputs"][0].update(ranges={"tokens": [1, 4, 8]}), "not in its shape"),
        (lambda r: r["inputs"][0].update(extra=1), r"unknown keys \['extra'\]"),
        (lambda r: r.update(source_onnx="model.onnx"), "go together"),
        (lambda r: r.update(operating_system="linux"), "runs on every operating system"),
        (lambda r: r.update(hardware_compatible="hopper"), "hardware_compatible is 'hopper'"),
        (lambda r: r.update(version_compatible=True), "only tensorrt builds plans for other releases or GPUs"),
        (
            lambda r: r.update(hardware_compatible="ampere_plus"),
            "only tensorrt builds plans for other releases or GPUs",
        ),
        (lambda r: r.update(cpu_architecture="x86_64"), "go together"),
        (lambda r: r.update(provenance=[]), "provenance must be an object"),
        (lambda r: r.update(backend_version="1'; echo '"), "is no version"),
        (lambda r: r.update(external=[{"name": "../w", "sha256": "0" * 64, "bytes": 1}]), "bare file name"),
        (lambda r: r.update(external=[{"name": "w", "sha256": "0" * 64, "bytes": 1}] * 2), "lists a file twice"),
        (lambda r: r.update(backend="tensorrt"), "lists no compute capability"),
        (
            lambda r: r.update(backend="tensorrt", compute_capabilities=["8.9"], profiles=[{"time": [1, 2, 3]}]),
            r"a range for \['time'\], which no input has",
        ),
        (
            lambda r: r.update(
                backend="tensorrt", compute_capabilities=["8.9"], operating_system="", cpu_architecture=""
            ),
            "empty text",
        ),
    ],
)
def test_a_resealed_edit_is_refused(manifest: Manifest, change: Change, complaint: str) -> None:
    with pytest.raises(ArtifactRejected, match=complaint):
        Manifest.from_json(resealed(manifest.to_json(), change))


@pytest.mark.parametrize("path", ["/etc/model.onnx", "C:\\model.onnx", "C:model.onnx", "\\\\host\\share\\m.onnx", ""])
def test_an_absolute_source_is_refused(manifest: Manifest, path: str) -> None:
    change = {"source_onnx": path, "source_sha256": "0" * 64}
    with pytest.raises(ArtifactRejected, match="relative path"):
        Manifest.from_json(resealed(manifest.to_json(), lambda record: record.update(change)))


def test_a_repeated_key_is_refused(manifest: Manifest) -> None:
    with pytest.raises(ArtifactRejected, match="repeated"):
        Manifest.from_json(manifest.to_json().replace("{", '{"schema": 1,', 1))


def test_nan_is_refused(manifest: Manifest) -> None:
    text = resealed(manifest.to_json(), lambda record: record.update(sparsity={"share": float("nan")}))
    with pytest.raises(ArtifactRejected, match="NaN is not a JSON number"):
        Manifest.from_json(text)


def test_a_missing_manifest_names_the_file_and_the_command(model: Path) -> None:
    manifest_path(model).unlink()
    with pytest.raises(ArtifactRejected, match=r"model\.fp32\.onnx\.manifest\.json is missing.*`tnm-pipeline export`"):
        verify_artifact(model)


def test_a_missing_artifact_is_refused(model: Path) -> None:
    model.unlink()
    with pytest.raises(ArtifactRejected, match=r"model\.fp32\.onnx is not a file"):
        verify_artifact(model)


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactRejected, match="is not a file"):
        verify_artifact(tmp_path)


def test_a_manifest_of_another_file_is_refused(model: Path) -> None:
    renamed = model.with_name("renamed.onnx")
    model.rename(renamed)
    manifest_path(model).rename(manifest_path(renamed))
    with pytest.raises(ArtifactRejected, match=r"describes 'model\.fp32\.onnx', not 'renamed\.onnx'"):
        verify_artifact(renamed)


def test_a_manifest_that_is_not_text_is_refused(model: Path) -> None:
    manifest_path(model).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactRejected, match="cannot be read"):
        verify_artifact(model)


def test_a_truncated_file_is_refused_with_both_sizes(model: Path) -> None:
    content = model.read_bytes()
    model.write_bytes(content[:-1])
    with pytest.raises(ArtifactRejected, match=f"has {len(content) - 1} bytes, its manifest states {len(content)}"):
        verify_artifact(model)


@pytest.mark.parametrize("check", [verify_artifact, read_verified])
def test_one_flipped_bit_anywhere_is_refused(model: Path, check: Callable[[Path], object]) -> None:
    content = bytearray(model.read_bytes())
    for place in range(0, len(content), 7):
        content[place] ^= 1
        model.write_bytes(content)
        with pytest.raises(ArtifactRejected, match="has sha256"):
            check(model)
        content[place] ^= 1


def test_writing_leaves_only_the_manifest(model: Path, manifest: Manifest) -> None:
    written = write_manifest(model, dataclasses.replace(manifest, gpu="NVIDIA A100"))
    assert written == manifest_path(model)
    assert sorted(path.name for path in model.parent.iterdir()) == [model.name, written.name]
    assert verify_artifact(model).gpu == "NVIDIA A100"


def test_a_failed_write_keeps_the_old_manifest(model: Path, manifest: Manifest) -> None:
    not_json = dataclasses.replace(manifest, sparsity={"share": float("nan")})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_manifest(model, not_json)
    assert verify_artifact(model) == manifest
    assert len(list(model.parent.iterdir())) == 2


def test_what_could_not_be_read_is_not_written(model: Path, manifest: Manifest) -> None:
    deep: object = []
    for _ in range(40):
        deep = [deep]
    for provenance in ({"deep": deep}, {"large": ["x" * 4000] * 3000}, {"long": 1 << 70}):
        with pytest.raises(ArtifactRejected):
            write_manifest(model, dataclasses.replace(manifest, provenance=provenance))
    assert verify_artifact(model) == manifest


def test_a_manifest_beyond_the_limit_is_refused_before_it_is_parsed(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with manifest_path(model).open("a") as file:
        file.write(" " * strict_json.MAX_BYTES)  # white space, which JSON allows
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(ArtifactRejected, match="has more than 8,388,608 bytes"):
        verify_artifact(model)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(model: Path) -> None:
    manifest_path(model).unlink()
    os.mkfifo(manifest_path(model))
    with pytest.raises(ArtifactRejected, match="it is not a file"):
        verify_artifact(model)


def test_a_grown_file_is_not_read_into_memory(model: Path) -> None:
    stated = verify_artifact(model).bytes
    with model.open("r+b") as file:
        file.truncate(1 << 40)  # takes no room on the disk
    with pytest.raises(ArtifactRejected, match=f"has {1 << 40} bytes, its manifest states {stated}"):
        read_verified(model)


NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)
RANGE = st.tuples(*[st.integers(0, 2**40)] * 3).map(lambda sizes: tuple(sorted(sizes)))
SHA256 = st.text("0123456789abcdef", min_size=64, max_size=64)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["../x", "8.9", "a\0", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=10,
)


@st.composite
def tensors(draw: st.DrawFn) -> TensorSpec:
    shape = draw(st.lists(st.integers(0, 2**40) | NAMES, max_size=4).map(tuple))
    ranges = {size: draw(RANGE) for size in shape if isinstance(size, str) and draw(st.booleans())}
    return TensorSpec(draw(NAMES), draw(st.sampled_from(DTYPES)), shape, ranges)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    sides = st.lists(tensors(), min_size=1, max_size=3, unique_by=lambda spec: spec.name).map(tuple)
    plan = draw(st.booleans())
    machine = (
        draw(st.sampled_from([(None, None), ("linux", "x86_64"), ("windows", "x86_64")])) if plan else (None, None)
    )
    inputs = draw(sides)
    dims = [size for spec in inputs for size in spec.shape if isinstance(size, str)]
    profile = st.fixed_dictionaries(dict.fromkeys(dims, RANGE))
    free = st.dictionaries(NAMES, st.none() | st.booleans() | st.integers(-(2**60), 2**60) | NAMES, max_size=3)
    external = st.lists(st.from_regex(r"[a-z]{4,8}\.data", fullmatch=True), max_size=2, unique=True)
    return Manifest(
        artifact=draw(st.from_regex(r"[a-z]{4,8}\.(onnx|plan)", fullmatch=True)),
        sha256=draw(SHA256),
        bytes=draw(st.integers(0, 2**62)),
        backend=draw(st.sampled_from(["tensorrt", "tensorrt_rtx"])) if plan else "onnxruntime",
        backend_version=draw(st.from_regex(r"[0-9]+\.[0-9]+(rc1)?", fullmatch=True)),
        precision=draw(st.sampled_from(PRECISIONS)),
        inputs=inputs,
        outputs=draw(sides),
        source_onnx="../export/model.onnx" if plan else None,
        source_sha256=draw(SHA256) if plan else None,
        sparse_weights_flag=draw(st.booleans()) if plan else None,
        compute_capabilities=("8.9", "12.0") if plan else (),
        gpu=draw(st.none() | NAMES),
        driver=draw(st.none() | NAMES),
        sparsity=draw(free),
        profiles=tuple(draw(st.lists(profile, max_size=2))) if plan else (),
        external=() if plan else tuple(ExternalFile(name, draw(SHA256), 7) for name in draw(external)),
        operating_system=machine[0],
        cpu_architecture=machine[1],
        provenance=draw(free),
    )


@settings(deadline=None)
@given(manifests())
def test_any_manifest_comes_back_from_its_text(manifest: Manifest) -> None:
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text


@settings(deadline=None)
@given(VALUES)
def test_any_json_is_refused(value: object) -> None:
    with pytest.raises(ArtifactRejected):
        Manifest.from_json(json.dumps(value))


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every (object or list, key or index) inside JSON content."""
    keys = content if isinstance(content, dict) else range(len(content)) if isinstance(content, list) else ()
    found = [(content, key) for key in keys]
    return found + [place for holder, key in found for place in places(holder[key])]


@settings(deadline=None)
@given(manifests(), VALUES, st.integers(0, 1000))
def test_any_value_in_any_place_is_read_or_refused(manifest: Manifest, value: object, where: int) -> None:
    """With a digest that fits: only the check of that place can refuse it, and none raises anything else."""
    record = json.loads(manifest.to_json())
    holder, key = (found := places(record))[where % len(found)]
    holder[key] = value
    with suppress(ArtifactRejected):
        read = Manifest.from_json(resealed(json.dumps(record), lambda _: None))
        assert Manifest.from_json(read.to_json()) == read


def test_writing_under_another_name_is_refused(model: Path, manifest: Manifest) -> None:
    with pytest.raises(ArtifactRejected, match="cannot describe"):
        write_manifest(model.with_name("other.onnx"), manifest)
