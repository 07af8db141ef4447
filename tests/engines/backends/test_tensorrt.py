"""The TensorRT backend: what it refuses before TensorRT is imported, and its calls against a stand-in."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines.backends.on_stand_ins import START
from tnm_pipeline.engines import EnvironmentLacks, FeedError, TensorSpec, verify_artifact
from tnm_pipeline.engines.backends.tensorrt_profiles import covering_profile, warm_sizes, zero_feeds
from tnm_pipeline.engines.backends.tensorrt_runtime import check_gpu
from tnm_pipeline.engines.driver import Driver, Gpu, probe

Run = Callable[..., str]


def test_a_machine_without_a_gpu_is_told_so(plan: Path) -> None:
    with pytest.raises(EnvironmentLacks, match=r"model\.fp16\.plan is a tensorrt_rtx plan and needs a GPU: no driver"):
        check_gpu(verify_artifact(plan), Driver(None, (), "no driver"))


def test_another_gpu_is_named_with_both_sides(plan: Path) -> None:
    other = Driver("13.0", (Gpu("NVIDIA H200", "9.0"),), None)
    with pytest.raises(EnvironmentLacks, match=r"built for compute capability 8\.0, 8\.9, and NVIDIA H200 has 9\.0"):
        check_gpu(verify_artifact(plan), other)


@pytest.mark.parametrize("capability", ["8.0", "8.9"])
def test_a_gpu_that_the_plan_was_built_for_passes(plan: Path, capability: str) -> None:
    check_gpu(verify_artifact(plan), Driver("13.0", (Gpu("some GPU", capability),), None))


def test_another_gpu_is_refused_before_the_runtime_is_imported(run_on_host_driver: Run, plan: Path) -> None:
    code = f"""{START}
try:
    load(sys.argv[1])
except EnvironmentLacks as error:
    print("tensorrt_rtx" in sys.modules, error)
"""
    said = run_on_host_driver(code, plan, HOST_DRIVER_CAPABILITY="9.0")
    assert said.startswith("False model.fp16.plan was built for compute capability 8.0, 8.9, and Host Memory has 9.0")


def test_the_fallback_covers_another_gpu(run_on_host_driver: Run, plan: Path) -> None:
    code = f"""{START}
with load(sys.argv[1], fallback="onnxruntime", device="cpu") as session:
    print(session.run({{"input": np.zeros((2, 8), "float32")}})["output"].shape, session.fallback_reason)
"""
    said = run_on_host_driver(code, plan, HOST_DRIVER_CAPABILITY="9.0")
    assert said.startswith("(2, 16) model.fp16.plan was built for")


def test_another_release_is_named_with_the_command(
    run_on_host_driver: Run, doubler: Callable[..., Path], stand_in: str
) -> None:
    code = f"""{START}
try:
    load(sys.argv[1])
except EnvironmentLacks as error:
    print(error)
"""
    said = run_on_host_driver(code, doubler(backend_version="10.8.0.43"), PYTHONPATH=stand_in)
    assert "was built with tensorrt 10.8.0.43, and 10.13.2.6 is installed" in said
    assert "pip install 'tensorrt==10.8.*'" in said


def test_a_plan_for_later_releases_runs_in_them_and_not_in_earlier_ones(
    run_on_host_driver: Run, doubler: Callable[..., Path], stand_in: str
) -> None:
    code = f"""{START}
try:
    with load(sys.argv[1], warm_up=False) as session:
        ask(session, 2)
    print("answered")
except EnvironmentLacks as error:
    print(error)
"""
    said = [
        run_on_host_driver(
            code, doubler(b"a plan with code", backend_version=version, version_compatible=yes), PYTHONPATH=stand_in
        )
        for version, yes in (("10.8.0.43", True), ("9.3.0", True), ("10.14.0.1", True), ("10.13.0.35", False))
    ]
    assert [line.strip() for line in said[:2]] == ["answered"] * 2
    assert "was built with tensorrt 10.14.0.1, and 10.13.2.6 is installed" in said[2]
    assert "host code is not allowed" in said[3]


@pytest.mark.parametrize(
    ("built_for", "compatible", "here", "runs"),
    [
        ("8.9", "ampere_plus", "9.0", True),
        ("9.0", "ampere_plus", "8.0", True),
        ("8.9", "ampere_plus", "10.3", True),
        ("8.9", "ampere_plus", "7.5", False),
        ("8.9", "same_compute_capability", "8.9", True),
        ("8.9", "same_compute_capability", "9.0", False),
        ("8.9", None, "9.0", False),
    ],
)
def test_a_plan_for_other_gpus_runs_on_those_that_it_names(
    doubler: Callable[..., Path], built_for: str, compatible: str | None, here: str, runs: bool
) -> None:
    manifest = verify_artifact(doubler(compute_capabilities=(built_for,), hardware_compatible=compatible))
    machine = Driver("13.0", (Gpu("some GPU", here),), None)
    with nullcontext() if runs else pytest.raises(EnvironmentLacks, match="was built for compute capability"):
        check_gpu(manifest, machine)


def test_a_release_before_10_is_too_old(run_on_host_driver: Run, doubler: Callable[..., Path], tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "tensorrt.py").write_text("__version__ = '8.6.1'")
    code = f"""{START}
try:
    load(sys.argv[1])
except EnvironmentLacks as error:
    print(error)
"""
    said = run_on_host_driver(code, doubler(backend_version="8.6.1"), PYTHONPATH=str(old))
    assert "8.6.1 is installed: TensorRT 10 is the oldest that is served" in said


@pytest.mark.skipif(bool(probe().gpus), reason="here a driver is")
@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("environment", [{}, {"HOST_DRIVER_NO_GPU": "1"}, {"HOST_DRIVER_INIT_FAILS": "100"}])
def test_without_a_gpu_no_runtime_is_made(
    backend: str,
    environment: dict[str, str],
    run_on_host_driver: Run,
    doubler: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """TensorRT's own would crash the process. Without a driver, with one that shows no GPU, with one that fails."""
    trap = tmp_path / "trap"
    trap.mkdir()
    (trap / f"{backend}.py").write_text("import os; os.abort()")
    code = """
import sys
from tnm_pipeline.engines import EnvironmentLacks, load
try:
    load(sys.argv[1])
except EnvironmentLacks as error:
    print(error)
"""
    settings = environment or {"LD_LIBRARY_PATH": ""}
    said = run_on_host_driver(code, doubler(backend=backend), PYTHONPATH=str(trap), **settings)
    assert said.startswith(f"model.plan is a {backend} plan and needs a GPU: ")


def test_a_missing_package_is_named_with_the_command(
    run_on_host_driver: Run, doubler: Callable[..., Path], tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "tensorrt.py").write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    code = f"""{START}
try:
    load(sys.argv[1])
except EnvironmentLacks as error:
    print(error)
"""
    said = run_on_host_driver(code, doubler(), PYTHONPATH=str(broken))
    assert "needs tensorrt 10.13.0.35: libnvinfer.so.10: cannot open" in said
    assert "pip install 'tensorrt==10.13.*'" in said


def test_batches_of_any_size_come_back_and_everything_is_freed(
    run_on_host_driver: Run, doubler: Callable[..., Path], stand_in: str
) -> None:
    code = f"""{START}
session = load(sys.argv[1], warm_up=False)
answers = []
for rows in (1, 8, 3, 8):
    given = np.random.default_rng(rows).standard_normal((8, rows)).astype(np.float32).T
    answers.append((session.run({{"input": given}})["output"], 2 * given))
assert all(np.array_equal(*pair) for pair in answers), "an answer belongs to the caller: later runs leave it alone"
print(session.backend, session.device, session.fallback_reason)
session.close()
print(held())
network = backend(contexts=2, graphs=0)
for rows in (1, 8, 3, 8):
    network.run({{"input": np.ones((rows, 8), np.float32)}})
print(held())
network.close()
print(held())
"""
    said = run_on_host_driver(code, doubler(), PYTHONPATH=stand_in)
    assert said.splitlines() == [
        "tensorrt cuda None",
        "0",
        # Twice: CUDA context, stream, scratch; once, as the last context back is the first to go out again: a buffer on
        # each side for input and output; and one more CUDA context.
        "11",
        "0",
    ]


def test_a_failed_run_is_explained_and_the_next_one_answers(
    run_on_host_driver: Run, doubler: Callable[..., Path], stand_in: str
) -> None:
    code = f"""{START}
with load(sys.argv[1], warm_up=False) as session:
    for rows in (9, 6, 5, 4):
        try:
            session.run({{"input": np.ones((rows, 8), np.float32)}})
        except (ArtifactRejected, FeedError, RunFailed) as error:
            print(type(error).__name__, error)
    assert (session.run({{"input": np.ones((2, 8), np.float32)}})["output"] == 2).all()
print(held())
"""
    lines = run_on_host_driver(code, doubler(), PYTHONPATH=stand_in).splitlines()
    for line, start in zip(
        lines,
        [
            "FeedError input input has batch = 9 on axis 0, and the plan was built for 1 to 8",
            "FeedError TensorRT refuses input input of shape (6, 8): six is right out",
            "ArtifactRejected the shape of output output is (-1, 8): it depends on the data",
            "RunFailed TensorRT did not run model.plan: it gives no reason",
            "0",
        ],
        strict=True,
    ):
        assert line.startswith(start)


def test_the_profile_changes_with_the_sizes(
    run_on_host_driver: Run, doubler: Callable[..., Path], stand_in: str
) -> None:
    """And only then: a change costs time. Profile 0 is what a context starts with, and profile 2 fails."""
    code = f"""{START}
network = backend(contexts=1, graphs=0)
for rows in (1, 1, 3, 1, 8):
    try:
        assert (network.run({{"input": np.ones((rows, 8), np.float32)}})["output"] == 2).all()
    except RunFailed as error:
        print(error)
    print("rows", rows)
"""
    profiles = tuple({"batch": sizes} for sizes in ((1, 1, 1), (1, 2, 4), (8, 8, 8)))
    lines = run_on_host_driver(code, doubler(profiles=profiles), PYTHONPATH=stand_in).splitlines()
    assert lines == [
        *("rows 1", "rows 1"),
        *("profile 1", "rows 3"),
        *("profile 0", "rows 1"),
        *("profile 2", "TensorRT does not change to profile 2: it gives no reason", "rows 8"),
    ]


IDS = TensorSpec("ids", "int64", ("batch", "sequence"))
SCALE = TensorSpec("scale", "float32", (3,))
PROFILES = [
    {"batch": (1, 1, 1), "sequence": (1, 64, 128)},
    {"batch": (1, 8, 64), "sequence": (1, 16, 32)},
]


@pytest.mark.parametrize(("batch", "sequence", "profile"), [(1, 1, 0), (1, 128, 0), (2, 1, 1), (64, 32, 1), (1, 32, 0)])
def test_the_first_profile_that_covers_the_sizes(batch: int, sequence: int, profile: int) -> None:
    feeds = {"scale": np.zeros(3), "ids": np.zeros((batch, sequence))}
    assert covering_profile(PROFILES, (SCALE, IDS), feeds) == profile


def test_sizes_that_only_the_profiles_together_span() -> None:
    complaint = (
        r"no profile of the plan holds batch = 2, sequence = 64 \(profile 0: batch 1 to 1, sequence 1 to 128; "
        r"profile 1: batch 1 to 64, sequence 1 to 32\): split or pad"
    )
    with pytest.raises(FeedError, match=complaint):
        covering_profile(PROFILES, (IDS,), {"ids": np.zeros((2, 64))})


def test_warm_up_takes_the_largest_sizes_of_all_profiles_first_and_none_twice() -> None:
    profiles = [{"n": (1, 4, 8)}, {"n": (1, 8, 8)}, {"n": (1, 2, 16)}]
    assert warm_sizes(profiles, (IDS,)) == [{"n": 8}, {"n": 16}, {"n": 4}, {"n": 2}]
    spanned = TensorSpec("x", "float32", ("n", 3), {"n": (1, 4, 8)})
    assert [zero_feeds((spanned,), sizes)["x"].shape for sizes in warm_sizes((), (spanned,))] == [(8, 3), (4, 3)]
    assert warm_sizes((), (SCALE,)) == [{}]


def test_a_plan_of_fixed_sizes_has_no_profile_to_choose() -> None:
    assert covering_profile((), (SCALE,), {"scale": np.zeros(3)}) == 0


@pytest.mark.parametrize(
    ("content", "changes", "complaint"),
    [
        (b"another plan", {}, "EnvironmentLacks tensorrt cannot make an engine of model.plan"),
        (b"a plan of shapes", {}, "ArtifactRejected model.plan reads input on the CPU"),
        (
            b"a plan",
            {"outputs": (TensorSpec("y", "float32", ("batch", 8), {}),)},
            "ArtifactRejected the plan's outputs",
        ),
    ],
)
def test_a_plan_that_does_not_load_leaves_nothing_on_the_gpu(
    run_on_host_driver: Run,
    doubler: Callable[..., Path],
    stand_in: str,
    content: bytes,
    changes: dict[str, Any],
    complaint: str,
) -> None:
    code = f"""{START}
try:
    load(sys.argv[1])
except (ArtifactRejected, EnvironmentLacks) as error:
    print(held(), type(error).__name__, error)
"""
    said = run_on_host_driver(code, doubler(content, **changes), PYTHONPATH=stand_in)
    assert said.startswith(f"0 {complaint}")
    assert "a warning" not in said
    assert ("magic tag does not match" in said) == (content == b"another plan")
