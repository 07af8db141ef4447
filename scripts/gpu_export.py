"""What only a GPU can show of exported 2:4 networks: which builder picks sparse tactics, and whether that is faster.

It has not run on a GPU yet: on a machine without one only `--quick` was tried, which is ONNX Runtime on the CPU.

Random weights, pruned to 2:4, in fp16: stacks of matrix products 256 to 4096 wide, a ResNet, and a layer of BERT, in

- tensorrt and tensorrt_rtx: the plan with SPARSE_WEIGHTS against one of the same file without;
- onnxruntime: the pruned against the dense network. It has no product that skips zeros: no difference is expected;
- torch: `to_sparse_semi_structured` against the same weights with their zeros, as a reference. Linear layers only.

All is timed in turns with its dense twin and with that twin loaded once more, as `tnm-pipeline bench` does. A call
includes the copies of its inputs and outputs, except in torch, where they stay on the GPU. Columns:

- dense us, sparse us: medians; ratio, interval: sparse over dense, with 95%; control: dense over itself;
- claim: what these carry, or why they carry nothing, such as a GPU that was slowed or shared;
- eligible, picked: layers that the builder called eligible, and took a sparse tactic for;
- inspected: layers of the engine inspector that mention sparsity;
- error: against torch in fp32, relative to the largest output.

What is not installed is skipped, and said to be.

Usage: python scripts/gpu_export.py [--quick] [--only WAY] [--json docs/benchmarks/export_GPU_DATE.json]
"""

import argparse
import copy
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from gpu_export_networks import Network, networks
from torch import Tensor, nn

from tnm_pipeline.engines.driver import probe
from tnm_pipeline.export.environment import environment
from tnm_pipeline.export.latency import LatencyTable, claim, measure

NO_GPU = 4
WAYS = ("tensorrt", "tensorrt_rtx", "onnxruntime", "torch")
COLUMNS = (
    *("network", "way", "batch", "dense_us", "sparse_us", "ratio", "interval", "control", "claim"),
    *("eligible", "picked", "inspected", "error"),
)
Row = dict[str, Any]
Ask = Callable[[Tensor], Tensor]
Twins = Mapping[str, Ask]  # sparse, dense, dense again


def why_not(way: str, *, quick: bool) -> str | None:
    """Why a way cannot be timed here; None if it can."""
    if quick and way != "onnxruntime":
        return "--quick is for the CPU"
    needed = {"torch": []}.get(way, [way, "onnx", "onnxscript"])
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if way == "torch":
        from tnm_pipeline.training.kernels.support import why_never, why_not_now
        from tnm_pipeline.training.pattern import Pattern

        weight = torch.zeros(64, 64)
        return why_never(weight, Pattern(2, 4)) or why_not_now(weight.cuda(), torch.float16)
    if way == "onnxruntime" and not quick:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
        return None if "CUDAExecutionProvider" in providers else f"this ONNX Runtime has only {', '.join(providers)}"
    return None


def export(network: Network, folder: Path, precision: str) -> tuple[Path, Path]:
    """The sparse and the dense network as ONNX files with manifests."""
    from tnm_pipeline.engines.artifact import write_manifest
    from tnm_pipeline.export.artifacts import onnx_manifest
    from tnm_pipeline.export.onnx import export_onnx
    from tnm_pipeline.export.precision import retype
    from tnm_pipeline.export.sparsity import inspect_onnx

    paths = []
    for name, model in (("sparse", network.sparse()), ("dense", network.dense())):
        path = folder / f"{name}.{precision}.onnx"
        exact = folder / f"{name}.fp32.onnx"
        export_onnx(model, network.inputs(2), exact)
        if precision == "fp16":
            retype(exact, path, "fp16")
        write_manifest(path, onnx_manifest(path, precision=precision, sparsity=inspect_onnx(path).summary()))
        paths.append(path)
    return paths[0], paths[1]


def build(path: Path, way: str, network: Network) -> tuple[Path, Path, Row]:
    """The plan with sparse weights allowed, its twin, and what the builder said about the first."""
    from tnm_pipeline.export.sparsity import inspect_onnx
    from tnm_pipeline.export.tensorrt import build_plan

    reports, plans = [], []
    for sparse in (True, False):
        plans.append(path.with_name(f"{way}.{sparse}.plan"))
        report = build_plan(
            path,
            plans[-1],
            sparse=sparse,
            precision="fp16",
            sparsity=inspect_onnx(path).summary(),
            backend="tensorrt" if way == "tensorrt" else "tensorrt_rtx",
            profiles=[{"batch": (1, network.batches[1], network.batches[-1])}],
            compute_capabilities=(probe().gpus[0].compute_capability,),
        )
        reports.append(report)
    told = reports[0]
    named = [one for one in told.inspector or () if "spars" in json.dumps(one).lower()]
    facts = {
        "eligible": told.eligible_layers,
        "picked": told.picked_layers,
        "inspected": None if told.inspector is None else len(named),
        "inspector": named,
        "said": [text for _, text in told.log.messages if "(Sparsity)" in text],
        "identical": plans[0].read_bytes() == plans[1].read_bytes(),
        "notes": list(told.notes),
    }
    return plans[0], plans[1], facts


@contextmanager
def sessions(sparse: Path, dense: Path, device: Any) -> Iterator[Twins]:
    """Load artifacts as production does."""
    from tnm_pipeline.engines import load

    with ExitStack() as stack:

        def ask(path: Path) -> Ask:
            session = stack.enter_context(load(path, device=device))
            taken, given = session.inputs[0].name, session.outputs[0].name
            return lambda inputs: torch.from_numpy(session.run({taken: inputs.numpy()})[given])

        yield {"sparse": ask(sparse), "dense": ask(dense), "dense again": ask(dense)}


def semi_structured(network: Network) -> tuple[Twins, Row]:
    """Packed and plain weights, the same numbers, on the GPU."""
    masked = network.sparse().half().cuda()
    packed = copy.deepcopy(masked)
    layers = [layer for layer in packed.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        layer.weight = nn.Parameter(torch.sparse.to_sparse_semi_structured(layer.weight.detach()), requires_grad=False)

    def ask(model: nn.Module) -> Ask:
        @torch.inference_mode()
        def answer(inputs: Tensor) -> Tensor:
            given: Tensor = model(inputs)
            torch.cuda.synchronize()
            return given

        return answer

    twins = {"sparse": ask(packed), "dense": ask(masked), "dense again": ask(copy.deepcopy(masked))}
    return twins, {"eligible": len(layers), "picked": len(layers), "inspected": None}


def timed(network: Network, way: str, twins: Twins, facts: Row, *, quick: bool, exact: nn.Module) -> Iterator[Row]:
    """A row for each batch size."""
    for batch in network.batches:
        inputs = network.inputs(batch)
        placed = inputs.half().cuda() if way == "torch" else inputs
        with torch.inference_mode():
            expected = exact(inputs)
        error = (twins["sparse"](placed).float().cpu() - expected).abs().max() / expected.abs().max()
        calls = {name: _call(ask, placed) for name, ask in twins.items()}
        table = measure(
            calls,
            repeats=20 if quick else 200,
            warmup=5 if quick else 30,
            baseline="dense",
            control="dense again",
            samples=batch,
            on_gpu=not quick,
        )
        yield {"network": network.name, "way": way, "batch": batch, **_figures(table), **facts, "error": float(error)}


def _call(ask: Ask, inputs: Tensor) -> Callable[[], object]:
    return lambda: ask(inputs)


def _figures(table: LatencyTable) -> Row:
    dense, sparse, control = table.row("dense"), table.row("sparse"), table.row("dense again")
    said = claim(table, "sparse")
    return {
        "dense_us": dense.median_us,
        "sparse_us": sparse.median_us,
        "samples_per_s": {row.name: row.samples_per_s for row in table.rows},
        "ratio": sparse.ratio,
        "interval": [sparse.ratio_low, sparse.ratio_high],
        "control": [control.ratio_low, control.ratio_high],
        "claim": said.key,
        "sentence": said.sentence,
        "looks": [vars(look) for look in table.looks],
    }


def bench(network: Network, way: str, *, quick: bool) -> Iterator[Row]:
    """All that one way does with one network."""
    exact = network.sparse()
    if way == "torch":
        if network.name == "residual":
            raise NotImplementedError("torch packs no convolutions")
        twins, facts = semi_structured(network)
        yield from timed(network, way, twins, facts, quick=quick, exact=exact)
        return
    with tempfile.TemporaryDirectory() as made:
        sparse, dense = export(network, Path(made), "fp32" if quick else "fp16")
        facts = {"eligible": None, "picked": None, "inspected": None}
        if way != "onnxruntime":
            sparse, dense, facts = build(sparse, way, network)
        with sessions(sparse, dense, "cpu" if quick else "cuda" if way == "onnxruntime" else "auto") as twins:
            yield from timed(network, way, twins, facts, quick=quick, exact=exact)


def print_row(row: Row) -> None:
    """One line."""
    print("  ".join(f"{_cell(row[name]):13}" for name in COLUMNS).rstrip(), flush=True)


def _cell(value: object) -> str:
    if isinstance(value, list):
        return "-".join(_cell(part) for part in value)
    if isinstance(value, float):
        return f"{value:.1f}" if value >= 100 else f"{value:.3f}" if value >= 0.1 else f"{value:.1e}"
    return "?" if value is None else str(value)


def main() -> None:
    """Time what can be timed, and say of the rest why not."""
    parser = argparse.ArgumentParser(description="Time exported 2:4 networks against their dense twins on a GPU.")
    parser.add_argument("--quick", action="store_true", help="small networks in ONNX Runtime on the CPU")
    parser.add_argument("--only", choices=WAYS, help="one way alone")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    driver = probe()
    if driver.reason is not None and not arguments.quick:
        print(f"{driver.reason}: run this where a GPU is, or --quick on the CPU", file=sys.stderr)
        sys.exit(NO_GPU)
    facts = environment() | {"compute_capabilities": [gpu.compute_capability for gpu in driver.gpus]}
    print(facts)
    print_row({name: name.replace("_", " ") for name in COLUMNS})
    rows: list[Row] = []
    skipped: list[Row] = []
    for way in [arguments.only] if arguments.only else WAYS:
        if (reason := why_not(way, quick=arguments.quick)) is not None:
            skipped.append({"way": way, "network": None, "why": reason})
            continue
        for network in networks(quick=arguments.quick):
            try:
                for row in bench(network, way, quick=arguments.quick):
                    rows.append(row)
                    print_row(row)
            except Exception as error:  # one that fails must not lose the hours of the others
                skipped.append({"way": way, "network": network.name, "why": f"{type(error).__name__}: {error}"})
    for one in skipped:
        print(f"skipped: {one['way']}{' ' + one['network'] if one['network'] else ''}: {one['why']}")
    if arguments.json:
        report = {"environment": facts, "rows": rows, "skipped": skipped}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if not rows:
        sys.exit("nothing could be timed")


if __name__ == "__main__":
    main()
