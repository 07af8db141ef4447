"""`inspect --what-if`: what other patterns would keep of a checkpoint's weights. Nothing is changed or written."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor

from tnm_pipeline.engines import ArtifactRejected
from tnm_pipeline.engines.artifact import manifest_path
from tnm_pipeline.pipeline.resolve import check_checkpoint
from tnm_pipeline.pipeline.tables import new_console, new_table
from tnm_pipeline.training.checkpoint import Checkpoint, read_checkpoint
from tnm_pipeline.training.layout import to_gemm
from tnm_pipeline.training.masks import count_violations, kept_magnitude, solve
from tnm_pipeline.training.pattern import Pattern, PatternError

_EMBEDDING = re.compile(r"embeddings?$|^(embed_tokens|embed_positions|wte|wpe)$")  # the usual names


@dataclass(frozen=True)
class Outcome:
    """One pattern on one weight, or on all of them.

    Attributes:
        pattern: text form.
        kept_magnitude: sum of kept abs(w) over sum of abs(w) under the pattern's exact mask, in [0, 1]; 1 where all
            weights are zero.
        violations: groups of the weight as it is that hold more than N non-zeros: of W, and for a transposable pattern
            of W^T too.
        groups: all of those, edge groups shorter than M included.
    """

    pattern: str
    kept_magnitude: float
    violations: int
    groups: int


@dataclass(frozen=True)
class LayerOutcomes:
    """One layer under every pattern.

    Attributes:
        layer: its name in the checkpoint, without `.weight`.
        shape: of the weight.
        density: fraction of non-zeros as it is.
        magnitude: sum of abs(w).
        outcomes: one per pattern, in the order asked.
    """

    layer: str
    shape: tuple[int, ...]
    density: float
    magnitude: float
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class WhatIf:
    """Every layer of a checkpoint under every pattern.

    Attributes:
        title: the file and what was asked.
        layers: in the checkpoint's order.
        total: one outcome per pattern: of all layers as if they were one weight.
        lines: what a reader has to know besides, one sentence each.
    """

    title: str
    layers: tuple[LayerOutcomes, ...]
    total: tuple[Outcome, ...]
    lines: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON-able values."""
        return asdict(self)

    def show(self) -> None:
        """Print on stdout."""
        console = new_console()
        console.print(self.title)
        if self.layers:
            counts = ("kept", "violations", "of groups")
            table = new_table("layer", "shape", "density", "pattern", *counts, right=counts)
            for row in self.layers:
                shape = "x".join(str(side) for side in row.shape)
                _add_rows(table, (row.layer, shape, f"{row.density:.1%}"), row.outcomes)
            table.add_section()
            _add_rows(table, ("all", "", ""), self.total)
            console.print(table)
        for line in self.lines:
            console.print(line)


def what_if_file(path: Path, patterns: str) -> WhatIf:
    """Solve every prunable weight of a checkpoint for every pattern; embeddings, which no command prunes, are left out.

    A checkpoint has no classes, so an embedding is what is called one, unless the record says that it holds a pattern.

    Args:
        path: `.safetensors` or `.pt`.
        patterns: text forms with commas between them, ``2:4,2:4-T``; what is named twice counts once.

    Raises:
        PatternError: a pattern cannot be read or cannot exist.
        ArtifactRejected: a missing file, or an ONNX file or plan.
        CheckpointError: not a readable checkpoint, or one with NaN or Inf.
    """
    asked = _parse(patterns)
    if not path.is_file():
        raise ArtifactRejected(f"{path} is no file: give a checkpoint, .safetensors or .pt")
    if path.suffix in (".onnx", ".plan") or manifest_path(path).exists():
        raise ArtifactRejected(
            f"{path} is no checkpoint, and --what-if reads the weights of one: give the file that it was exported "
            "from, such as best/model.safetensors or dense/model.safetensors in its run folder"
        )
    check_checkpoint(path)
    checkpoint = read_checkpoint(path)
    found = list(prunable_weights(checkpoint))
    promised = checkpoint.record.get("layers", {})
    embeddings = [name for name, weight in found if _is_embedding(name, weight) and name not in promised]
    weights = [(name, weight) for name, weight in found if name not in embeddings]
    layers = tuple(
        LayerOutcomes(
            layer=name,
            shape=tuple(weight.shape),
            density=int(weight.count_nonzero()) / max(weight.numel(), 1),
            magnitude=float(weight.abs().double().sum()),
            outcomes=tuple(outcome(weight, pattern) for pattern in asked),
        )
        for name, weight in weights
    )
    title = f"{path}: checkpoint, under {', '.join(map(str, asked))}"
    return WhatIf(title, layers, _total(layers, asked), (*_lines(weights, asked), *_left_out(embeddings)))


def prunable_weights(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Layer name and weight of everything in a checkpoint that has a GEMM form: 2-D and 4-D float tensors."""
    for name, tensor in checkpoint.tensors.items():
        if tensor.dim() in (2, 4) and tensor.is_floating_point():
            yield name.removesuffix(".weight"), tensor


def outcome(weight: Tensor, pattern: Pattern) -> Outcome:
    """What a pattern's exact mask would keep of a weight, and where the weight breaks the pattern now.

    Args:
        weight: (O, I) or (O, I, H, W), any real floating dtype, finite.
        pattern: the rule.
    """
    rows, columns = to_gemm(weight).shape
    groups = rows * -(-columns // pattern.m)
    if pattern.transposable:
        groups += columns * -(-rows // pattern.m)
    kept = kept_magnitude(weight, solve(weight, pattern))
    return Outcome(str(pattern), kept, count_violations(weight, pattern).of(pattern), groups)


def _parse(patterns: str) -> tuple[Pattern, ...]:
    try:
        return tuple(dict.fromkeys(Pattern.parse(text) for text in patterns.split(",")))
    except PatternError as error:
        error.add_note("--what-if takes patterns with commas between them, for example 2:4,2:4-T,4:8-T")
        raise


def _total(layers: Sequence[LayerOutcomes], patterns: Sequence[Pattern]) -> tuple[Outcome, ...]:
    magnitude = sum(row.magnitude for row in layers)
    totals = []
    for index, pattern in enumerate(patterns):
        parts = [row.outcomes[index] for row in layers]
        kept = sum(row.magnitude * part.kept_magnitude for row, part in zip(layers, parts, strict=True))
        totals.append(
            Outcome(
                pattern=str(pattern),
                kept_magnitude=kept / magnitude if magnitude else 1.0,
                violations=sum(part.violations for part in parts),
                groups=sum(part.groups for part in parts),
            )
        )
    return tuple(totals)


def _is_embedding(name: str, weight: Tensor) -> bool:
    return weight.dim() == 2 and _EMBEDDING.search(name.rpartition(".")[2]) is not None


def _left_out(embeddings: Sequence[str]) -> Iterator[str]:
    if embeddings:
        yield f"left out by their names, because no command prunes embeddings: {', '.join(embeddings)}"


def _lines(weights: Sequence[tuple[str, Tensor]], patterns: Sequence[Pattern]) -> Iterator[str]:
    if not weights:
        yield "no 2-D or 4-D floating-point tensor in it that could be pruned, so no pattern would change anything"
        return
    yield "kept: sum of kept |w| over sum of |w| under the pattern's exact mask"
    yield "violations: groups of the weights as they are with more than N of M non-zero, of W and for -T of W^T too"
    for m in sorted({pattern.m for pattern in patterns}):
        ragged = [name for name, weight in weights if weight.shape[1] % m]
        if ragged:
            yield f"inputs that {m} does not divide, which train and convert leave dense: {', '.join(ragged)}"


def _add_rows(table: Table, layer: tuple[str, str, str], outcomes: Sequence[Outcome]) -> None:
    """One row per pattern; the first says which layer they are about."""
    for number, result in enumerate(outcomes):
        cells = (result.pattern, f"{result.kept_magnitude:.2%}", str(result.violations), str(result.groups))
        table.add_row(*(("", "", "") if number else layer), *cells)
