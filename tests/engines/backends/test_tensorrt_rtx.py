"""TensorRT-RTX's own graphs and its cache of compiled kernels, against the stand-ins; the real one: pytest -m gpu."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.backends.on_stand_ins import START
from tnm_pipeline.engines import verify_artifact
from tnm_pipeline.engines.backends.runtime_cache import read_runtime_cache, runtime_cache_path, write_runtime_cache

Run = Callable[..., str]

ONCE = """
import warnings
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as warned:
    network = backend(contexts=2, graphs=4)
    for rows in (2, 2, 2):
        ask(network, rows)
    print(graphs(), network.describe()["graphs"], network.describe()["runtime_cache_bytes"])
    network.close()
print(held(), [str(one.message) for one in warned])
"""


@pytest.fixture
def doubling_plan(doubler: Callable[..., Path]) -> Path:
    """An artifact for the stand-in of TensorRT-RTX."""
    return doubler(backend="tensorrt_rtx", backend_version="1.7.0.1")


@pytest.fixture
def cache(doubling_plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the kernels of `doubling_plan` are kept; nothing is there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return runtime_cache_path(verify_artifact(doubling_plan), "1.7.1.116", "Host Memory")


@pytest.fixture
def run(run_on_host_driver: Run, doubling_plan: Path, stand_in: str, cache: Path) -> Run:
    """Run code after `START` with `doubling_plan` as its argument and an empty cache folder."""
    return lambda code: run_on_host_driver(START + code, doubling_plan, PYTHONPATH=stand_in)


def test_the_runtime_makes_its_own_graphs_and_we_make_none(run: Run) -> None:
    assert run(ONCE).splitlines() == [
        *("WHOLE_GRAPH_CAPTURE", "WHOLE_GRAPH_CAPTURE"),
        "compiles",
        "0 the runtime's 0",
        "0 []",
    ]
    assert run("network = backend(contexts=1, graphs=0); print(network.describe()['graphs'])").splitlines() == [
        "DISABLED",
        "off",
    ]


def test_kernels_are_compiled_once_for_both_contexts_and_for_the_next_process(run: Run, cache: Path) -> None:
    first, second = run(ONCE), run(ONCE)
    assert first.count("compiles") == 1
    assert "compiles" not in second
    assert "0 the runtime's 7" in second
    assert cache.read_bytes() == b"kernels"
    assert sorted(path.name for path in cache.parent.iterdir()) == [cache.name]


def test_warm_up_keeps_the_kernels_before_anybody_closes(run: Run, cache: Path) -> None:
    code = """
import dataclasses
content = read_verified(Path(sys.argv[1]))
manifest = dataclasses.replace(content.manifest, profiles=({"batch": (1, 2, 8)},))
network = TensorRTBackend(manifest, content.artifact, driver=probe(), limits=Limits())
network.warm_up()
print(network.describe()["runtime_cache"])
"""
    assert run(code).splitlines()[-1] == str(cache)
    assert cache.read_bytes() == b"kernels"


@pytest.mark.parametrize("content", [b"", b"kernels of another GPU", b"kern"])
def test_a_cache_that_the_runtime_refuses_is_replaced(run: Run, cache: Path, content: bytes) -> None:
    write_runtime_cache(cache, content)
    assert "compiles" in run(ONCE)
    assert cache.read_bytes() == b"kernels"


@pytest.mark.skipif(os.name != "posix", reason="there, the folder of a user is private by default")
def test_kernels_that_others_could_have_written_reach_no_runtime(run: Run, cache: Path) -> None:
    write_runtime_cache(cache, b"kernels")
    cache.chmod(0o666)
    said = run(ONCE)
    assert "compiles" in said
    assert "compiled kernels of model.plan are not read" in said
    assert "can be written by other users: remove it" in said


def test_a_folder_that_cannot_be_written_is_a_warning(run: Run, cache: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    said = run(ONCE)
    assert "compiles" in said
    assert "compiled kernels of model.plan are not kept for the next load" in said


def test_the_file_is_the_users_alone(cache: Path) -> None:
    assert read_runtime_cache(cache) is None
    write_runtime_cache(cache, b"first")
    write_runtime_cache(cache, b"second")
    assert read_runtime_cache(cache) == b"second"
    if os.name == "posix":
        assert cache.stat().st_mode & 0o777 == 0o600


def test_another_plan_release_or_gpu_has_another_file(doubling_plan: Path, cache: Path) -> None:
    manifest = verify_artifact(doubling_plan)
    others = [runtime_cache_path(manifest, "1.8", "Host Memory"), runtime_cache_path(manifest, "1.7.1.116", "Other")]
    assert len({cache, *others}) == 3
    assert manifest.sha256[:32] in cache.name


def test_the_real_package_has_every_name_that_the_stand_in_has() -> None:
    """Of what the package calls; without a GPU none of it can be called."""
    real: Any = pytest.importorskip("tensorrt_rtx")
    for owner, names in {
        "Runtime": ("deserialize_cuda_engine",),
        "ICudaEngine": (
            *("num_io_tensors", "device_memory_size_v2", "get_tensor_name", "get_tensor_mode", "get_tensor_location"),
            *("get_tensor_dtype", "get_tensor_shape", "create_execution_context", "create_runtime_config"),
        ),
        "IExecutionContext": (
            *("set_device_memory", "set_optimization_profile_async", "set_input_shape", "get_tensor_shape"),
            *("set_tensor_address", "execute_async_v3"),
        ),
        "IRuntimeConfig": ("cuda_graph_strategy", "create_runtime_cache", "set_runtime_cache"),
        "IRuntimeCache": ("serialize", "deserialize"),
        "CudaGraphStrategy": ("DISABLED", "WHOLE_GRAPH_CAPTURE"),
        "ExecutionContextAllocationStrategy": ("USER_MANAGED",),
        "TensorLocation": ("DEVICE",),
    }.items():
        assert not [name for name in names if not hasattr(getattr(real, owner), name)]


def test_the_real_runtime_on_a_driver_that_can_do_too_little_is_a_message(run_on_host_driver: Run, plan: Path) -> None:
    """The stand-in driver starts and shows a GPU, and then lacks what TensorRT-RTX itself asks of it."""
    code = f"""{START}
try:
    load(sys.argv[1])
except EnvironmentLacks as error:
    print(held(), error)
"""
    said = run_on_host_driver(code, plan)
    assert said.startswith("0 tensorrt_rtx cannot make an engine of model.fp16.plan (built with ")
    assert "not supported in the installed CUDA driver" in said
