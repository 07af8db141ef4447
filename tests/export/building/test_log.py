"""What is read from a builder's log."""

import pytest

from tnm_pipeline.export.building.log import BuildLog, short_of_memory


def log_of(*lines: str, severity: str = "VERBOSE") -> BuildLog:
    log = BuildLog()
    for line in lines:
        log.add(severity, line)
    return log


@pytest.mark.parametrize(
    ("lines", "eligible", "picked"),
    [
        ([], (None, None), (None, None)),
        (
            ["(Sparsity) Found 3 layer(s) eligible to use sparse tactics: a, b + c, d"],
            (3, ("a", "b + c", "d")),
            (None, None),
        ),
        (["(Sparsity) Found 39 layer(s) eligible to use sparse tactics"], (39, None), (None, None)),
        (["(Sparsity) Found 2 layer(s) eligible to use sparse tactics: one, of, three"], (2, None), (None, None)),
        (["(Sparsity) Chose 0 layer(s) using sparse tactics: "], (None, None), (0, ())),
        (
            [
                "(Sparsity) Layers eligible for sparse math: MatMul_401, Conv_619 + Relu_620",
                "(Sparsity) TRT inference plan picked sparse implementation for layers:",
            ],
            (2, ("MatMul_401", "Conv_619 + Relu_620")),
            (0, ()),
        ),
        (
            [
                "(Sparsity) Chose 2 layer(s) using sparse tactics: a, b",
                "(Sparsity) Chose 1 layer(s) using sparse tactics: b",
            ],
            (None, None),
            (1, ("b",)),
        ),
    ],
)
def test_sparsity_lines(
    lines: list[str],
    eligible: tuple[int | None, tuple[str, ...] | None],
    picked: tuple[int | None, tuple[str, ...] | None],
) -> None:
    log = log_of(*lines)
    assert (log.eligible_layers, log.eligible_names) == eligible
    assert (log.picked_layers, log.picked_names) == picked


def test_trouble_prefers_errors() -> None:
    log = BuildLog()
    assert log.trouble() == "the builder logged nothing"
    log.add("INFO", "hello")
    assert log.trouble() == "hello"
    log.add("ERROR", "broken")
    log.add("VERBOSE", "detail")
    assert log.trouble() == "broken"


def test_the_last_node() -> None:
    assert log_of("Parsing the graph").last_node is None
    assert log_of("Parsing node: conv [Conv]", "Parsing node: /layer.1/mm [MatMul]", "x").last_node == (
        "/layer.1/mm (MatMul)"
    )


@pytest.mark.parametrize(
    "text",
    [
        "Unexpected exception std::bad_alloc",
        "[virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (no further information)",
        "Requested amount of GPU memory (68719476736 bytes) could not be allocated.",
        "Cuda Runtime (out of memory)",
    ],
)
def test_short_of_memory(text: str) -> None:
    assert short_of_memory(log_of(text, severity="ERROR"))
    assert short_of_memory(BuildLog(), [text])


def test_memory_is_not_blamed_for_what_came_after() -> None:
    """A tactic that does not fit is tried and left; what ended the build are the errors after it."""
    log = log_of("Error Code 2: OutOfMemory", *["Attention operation was not supported"] * 5, severity="ERROR")
    assert not short_of_memory(log)
    assert not short_of_memory(log_of("total memory: 3 bytes", severity="ERROR"))
