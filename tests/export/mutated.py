"""A process that gives spoilt files to whatever reads ONNX.

Run as `python -m tests.export.mutated FOLDER FIRST COUNT`: it writes one line a call, so that who started it knows
which one it died on.
"""

import faulthandler
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from tests.export.mutations import mutate, seeds
from tnm_pipeline.export.errors import ExportRejected
from tnm_pipeline.export.precision import emulated, retype
from tnm_pipeline.export.sparsity import inspect_onnx

SECONDS = 5  # that one call may take
_MEMORY = 4 << 30  # bytes of address space; a tensor of the size that a spoilt shape declares does not fit


def _calls(path: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    half = path.with_name("half.onnx")
    yield "inspect", lambda: inspect_onnx(path)
    yield "fp16", lambda: retype(path, half, "fp16")
    yield "bf16", lambda: retype(path, half, "bf16")
    yield "emulated", lambda: emulated(path)


def _outcome(call: Callable[[], object]) -> str:
    """`done`, `rejected`, or what went wrong."""
    start = time.perf_counter()
    try:
        call()
        said = "done"
    except ExportRejected as error:
        starved = any(word in str(error) for word in ("Unable to allocate", "bad_alloc", "MemoryError"))
        said = f"WRONG out of memory: {error}" if starved else "rejected"
    except BaseException as error:  # whatever it is, it is what is looked for
        said = f"WRONG {type(error).__name__}: {error}"
    taken = time.perf_counter() - start
    return f"WRONG took {taken:.1f} s" if taken > SECONDS else said.replace("\n", " ")


def main(folder: Path, first: int, count: int) -> None:
    """Write `index call outcome` for every call on every file."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    (folder / "weights.bin").write_bytes(bytes(4096))
    models, path = seeds(), folder / "mutated.onnx"
    for index in range(first, first + count):
        path.write_bytes(mutate(np.random.default_rng(index), models))
        for name, call in _calls(path):
            print(index, name, end=" ", flush=True)  # noqa: T201 # lines for who started this
            faulthandler.dump_traceback_later(4 * SECONDS, exit=True)
            print(_outcome(call), flush=True)  # noqa: T201
            faulthandler.cancel_dump_traceback_later()


if __name__ == "__main__":
    faulthandler.enable()
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
