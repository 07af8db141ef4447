"""Many threads on the contexts of a plan, and their CUDA graphs, against the stand-ins for TensorRT and the driver.

What that proves: which context, buffer, graph and address serves which call, that nothing is read before it is waited
for, and that everything is freed. That TensorRT's own work can be captured, and is faster so, only a GPU can show.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.engines.backends.on_stand_ins import START

Run = Callable[..., str]


@pytest.fixture
def run(run_on_host_driver: Run, doubler: Callable[..., Path], stand_in: str) -> Run:
    """Run code after `START` with the artifact of the stand-in as its argument."""

    def start(code: str) -> str:
        return run_on_host_driver(START + code, doubler(), PYTHONPATH=stand_in)

    return start


@pytest.mark.parametrize("graphs", [0, 2, 8])
@pytest.mark.parametrize("contexts", [1, 3])
def test_eight_threads_with_mixed_sizes_get_their_own_answers(run: Run, contexts: int, graphs: int) -> None:
    """The stand-in fails where one context runs for two threads. Sizes grow on the way, so buffers move under load."""
    said = run(f"""
network = backend(contexts={contexts}, graphs={graphs})
failures = []
def work(seed):
    random = np.random.default_rng(seed)
    for turn in range(60):
        rows = int(random.choice((1, 2, 3) if turn < 20 else (1, 2, 3, 7, 8)))
        try:
            ask(network, rows, float(random.integers(1000)))
        except BaseException as error:
            failures.append(repr(error))
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(failures, graphs() <= {contexts * graphs}, network.describe()["graphs_kept"] == graphs())
network.close()
print(held())
""")
    assert said.splitlines() == ["[] True True", "0"]


def test_a_size_that_comes_back_is_captured_and_replayed(run: Run) -> None:
    said = run("""
network = backend(contexts=1, graphs=2)
for number in (1.0, 2.0, 3.0, 4.0):
    ask(network, 3, number)
    print(graphs(), launches())
network.close()
print(held())
""")
    assert said.splitlines() == ["0 0", "1 0", "1 1", "1 2", "0"]


def test_the_least_used_graph_makes_room_and_the_others_stay_right(run: Run) -> None:
    """A context whose state a graph has is never changed: the stand-in would refuse it."""
    said = run("""
network = backend(contexts=1, graphs=2)
ask(network, 8)
for rows in (1, 1, 2, 2, 1, 3, 3, 1, 2):
    ask(network, rows, 10.0 * rows)
    print(rows, graphs(), launches())
""")
    assert said.splitlines() == ["1 0 0", "1 1 0", "2 1 0", "2 2 0", "1 2 1", "3 2 1", "3 2 1", "1 2 2", "2 2 2"]


def test_a_buffer_that_grows_ends_the_graphs_with_its_old_address(run: Run) -> None:
    said = run("""
network = backend(contexts=1, graphs=4)
ask(network, 2); ask(network, 2); ask(network, 2)
print(graphs(), launches())
ask(network, 8)
ask(network, 2, 5.0)
print(graphs(), launches())
ask(network, 2, 6.0); ask(network, 2, 7.0)
print(graphs(), launches())
network.close()
print(held())
""")
    assert said.splitlines() == ["1 1", "0 1", "1 2", "0"]


def test_what_cannot_be_captured_runs_plainly_is_tried_once_and_says_why(run: Run) -> None:
    said = run("""
network = backend(contexts=1, graphs=4)
for number in (1.0, 2.0, 3.0, 4.0):
    ask(network, 7, number)
print(graphs(), launches(), network.describe()["graphs_refused"])
ask(network, 2); ask(network, 2); ask(network, 2)
print(graphs(), launches())
network.close()
print(held())
""")
    reason = "shapes (7, 8): TensorRT did not run model.plan: seven waits for the GPU halfway"
    assert said.splitlines() == [f"0 0 ['{reason}']", "1 1", "0"]


def test_an_error_in_one_context_leaves_all_of_them_usable(run: Run) -> None:
    said = run("""
network = backend(contexts=2, graphs=2)
for _ in range(3):
    for rows in (4, 6):
        try:
            network.run({"input": np.ones((rows, 8), np.float32)})
        except (FeedError, RunFailed) as error:
            print(type(error).__name__, error)
        for _ in range(4):
            ask(network, 2)
network.close()
print(held())
""")
    failed, refused = (
        "RunFailed TensorRT did not run model.plan: it gives no reason",
        "FeedError TensorRT refuses input input of shape (6, 8): six is right out",
    )
    assert said.splitlines() == [failed, refused] * 3 + ["0"]


def test_messages_of_threads_do_not_mix(run: Run) -> None:
    said = run("""
network = backend(contexts=4, graphs=0)
wrong = []
def work(rows, expected):
    for _ in range(40):
        try:
            network.run({"input": np.ones((rows, 8), np.float32)})
        except (FeedError, RunFailed) as error:
            if not str(error).endswith(expected):
                wrong.append(str(error))
threads = [
    threading.Thread(target=work, args=pair)
    for pair in [(4, "model.plan: it gives no reason"), (6, "(6, 8): six is right out"), (2, "")] * 2
]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(wrong[:3])
""")
    assert said.splitlines() == ["[]"]


def test_what_tensorrt_says_on_a_thread_of_its_own_is_quoted_as_such(run: Run) -> None:
    said = run("""
network = backend(contexts=1)
from tnm_pipeline.engines.backends.tensorrt_runtime import logger_of
logger, _ = logger_of("tensorrt")
import tensorrt
stray = threading.Thread(target=logger.log, args=(tensorrt.ILogger.Severity.ERROR, "a worker is unwell"))
stray.start()
stray.join()
try:
    network.run({"input": np.ones((4, 8), np.float32)})
except RunFailed as error:
    print(error)
""")
    assert said.strip().endswith("it gives no reason; it said on a thread of its own: a worker is unwell")


def test_a_call_beyond_the_contexts_waits_and_is_then_refused(run: Run) -> None:
    said = run("""
network = backend(contexts=1, patience=0.05)
with network._pool.lent():
    try:
        ask(network, 2)
    except Overloaded as error:
        print(error)
ask(network, 2)
network.close()
print(held())
""")
    assert said.splitlines() == [
        "all 1 contexts were busy for 0.05 s: load with a larger pool, or send less",
        "0",
    ]


def test_sizes_beyond_the_memory_fail_alone(run: Run) -> None:
    """The buffer that had to make way for the larger one is made again."""
    said = run("""
network = backend(contexts=1, graphs=2)
ask(network, 2); ask(network, 2); ask(network, 2)
device = network._contexts[0]._device
with device.current():
    try:
        device.reserve("input", 1 << 40)
    except DeviceOutOfMemory as error:
        print(error)
ask(network, 2, 3.0)
print(graphs())
network.close()
print(held())
""")
    assert said.splitlines() == [
        "cuMemAlloc_v2: the GPU is out of memory; use a smaller batch or free the GPU",
        *("0", "0"),
    ]


def test_warm_up_leaves_a_graph_for_the_best_and_the_largest_sizes(run: Run) -> None:
    """The ranges of the artifact are 1, 4, 8; 4 does not run here, so this plan was made for 2."""
    said = run("""
import dataclasses
content = read_verified(Path(sys.argv[1]))
profiles = ({"batch": (1, 2, 8)}, {"batch": (1, 1, 3)})
network = TensorRTBackend(
    dataclasses.replace(content.manifest, profiles=profiles),
    content.artifact, driver=probe(), limits=Limits(contexts=2, graphs=8),
)
network.warm_up()
print(graphs(), launches())
for rows in (8, 3, 2, 1) * 2:
    ask(network, rows)
print(graphs(), launches())
print({key: value for key, value in network.describe().items() if key != "graphs_refused"})
network.close()
print(held())
""")
    # Four sizes in two contexts. Each is answered by the first profile that holds it.
    assert said.splitlines() == ["8 0", "8 8", "{'contexts': 2, 'graphs': 'captured', 'graphs_kept': 8}", "0"]


def test_a_plan_that_fails_at_the_sizes_it_was_made_for_says_so_before_the_first_call(run: Run) -> None:
    said = run("""
network = backend(contexts=2)
try:
    network.warm_up()
except RunFailed as error:
    print(error)
network.close()
print(held())
""")
    assert said.splitlines() == ["TensorRT did not run model.plan: it gives no reason", "0"]


def test_loading_warms_up_unless_told_not_to(run: Run) -> None:
    """The sizes that this plan was made for are the ones that the stand-in does not run."""
    said = run("""
load(sys.argv[1], warm_up=False).close()
try:
    load(sys.argv[1])
except RunFailed as error:
    print(error)
print(held())
""")
    assert said.splitlines() == ["TensorRT did not run model.plan: it gives no reason", "0"]
