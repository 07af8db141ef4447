"""What tells tensorrt from tensorrt_rtx. tensorrt needs a GPU to be built with, so its calls are seen by a stand-in."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tnm_pipeline.export.building import builder
from tnm_pipeline.export.building.request import BuildRequest


class TimingConfig:
    """The calls of tensorrt's IBuilderConfig for timing caches; caches that begin with `of another` do not fit."""

    def __init__(self) -> None:
        self.cache: bytes | None = None

    def create_timing_cache(self, content: bytes) -> bytes | None:
        return None if content == b"damaged" else content

    def set_timing_cache(self, cache: bytes, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.startswith(b"of another"):
            return False
        self.cache = cache
        return True


def request(**changes: Any) -> BuildRequest:
    values: dict[str, Any] = {
        "builder": "tensorrt",
        "onnx": "m.onnx",
        "plan": "m.plan",
        "sparse": True,
        "precision": "fp16",
        "keep_fp32": (),
        "profiles": (),
        "compute_capabilities": ("9.0",),
        "workspace_mib": None,
        "timing_cache": None,
        "version_compatible": False,
        "hardware_compatible": None,
        "detailed": True,
        "inspect": False,
    }
    return BuildRequest(**{**values, **changes})


@pytest.mark.parametrize(
    ("kept", "used", "noted"),
    [(None, b"", 0), (b"of this GPU", b"of this GPU", 0), (b"of another GPU", b"", 1), (b"damaged", b"", 1)],
)
def test_timing_cache(kept: bytes | None, used: bytes, noted: int, tmp_path: Path) -> None:
    path = tmp_path / "timing"
    if kept is not None:
        path.write_bytes(kept)
    config, notes = TimingConfig(), list[str]()
    assert builder._timing_cache(config, request(timing_cache=str(path)), notes) == used
    assert config.cache == used
    assert len(notes) == noted
    assert all("started afresh" in note for note in notes)


def test_no_timing_cache_unless_asked_for() -> None:
    config = TimingConfig()
    assert builder._timing_cache(config, request(), []) is None
    assert config.cache is None


def test_a_timing_cache_that_cannot_be_written_costs_no_plan(tmp_path: Path) -> None:
    config = SimpleNamespace(get_timing_cache=lambda: SimpleNamespace(serialize=lambda: b"of this GPU"))
    notes: list[str] = []
    builder._keep_timing_cache(config, tmp_path / "timing", notes)
    assert (tmp_path / "timing").read_bytes() == b"of this GPU"
    assert notes == []
    (tmp_path / "folder/inside").mkdir(parents=True)
    builder._keep_timing_cache(config, tmp_path / "folder", notes)
    assert notes == [
        f"timing_cache {tmp_path / 'folder'} was not kept: Is a directory. The plan is whole; the next build times "
        "tactics anew"
    ]


def test_a_timing_cache_without_a_folder_is_refused_before_the_build(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        builder._timing_cache(TimingConfig(), request(timing_cache=str(tmp_path / "file/timing")), [])


@pytest.mark.parametrize("wanted", ["ampere_plus", "same_compute_capability"])
def test_hardware_compatibility(wanted: str) -> None:
    levels = SimpleNamespace(AMPERE_PLUS=1, SAME_COMPUTE_CAPABILITY=2)
    trt = SimpleNamespace(__name__="tensorrt", __version__="10.13", HardwareCompatibilityLevel=levels)
    config = SimpleNamespace(hardware_compatibility_level=0)
    builder._set_hardware_compatibility(trt, config, wanted)
    assert config.hardware_compatibility_level == getattr(levels, wanted.upper())


def test_a_level_that_the_builder_does_not_know() -> None:
    trt = SimpleNamespace(__name__="tensorrt", __version__="9.0", HardwareCompatibilityLevel=SimpleNamespace())
    with pytest.raises(NotImplementedError, match=r"tensorrt 9\.0 does not build plans that are hardware compatible"):
        builder._set_hardware_compatibility(trt, SimpleNamespace(), "ampere_plus")


def test_tensorrt_is_not_told_which_gpus_to_build_for() -> None:
    builder._set_targets(SimpleNamespace(), SimpleNamespace(), ("9.0",))


class Runtime:
    """An engine inspector that gives `answer`."""

    def __init__(self, answer: str | None) -> None:
        self.answer = answer

    def deserialize_cuda_engine(self, plan: bytes) -> "Runtime | None":
        return None if self.answer is None else self

    def create_engine_inspector(self) -> "Runtime":
        return self

    def get_engine_information(self, form: str) -> str | None:
        assert form == "JSON"
        return self.answer


@pytest.mark.parametrize(
    ("answer", "layers", "noted"),
    [
        ('{"Layers": [{"Name": "a", "LayerType": "gemm"}], "Bindings": []}', [{"Name": "a", "LayerType": "gemm"}], 0),
        ('{"Layers": ["a", "b"]}', [{"Name": "a"}, {"Name": "b"}], 0),
        ('{"Layers": [', None, 1),
        (None, None, 1),
    ],
)
def test_the_engine_inspector(answer: str | None, layers: list[dict[str, str]] | None, noted: int) -> None:
    trt = SimpleNamespace(Runtime=lambda logger: Runtime(answer), LayerInformationFormat=SimpleNamespace(JSON="JSON"))
    notes: list[str] = []
    assert builder._inspect(trt, None, b"plan", request(inspect=True), notes) == layers
    assert len(notes) == noted


def test_no_runtime_is_touched_without_a_gpu() -> None:
    assert builder._inspect(SimpleNamespace(), None, b"plan", request(), []) is None
