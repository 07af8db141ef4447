"""How much memory a conversion will take, told before it starts.

Two examples run through the model, and what is alive at each stop is counted; sums follow from the layers' shapes. The
constants below count tensors that the code of a conversion holds at the same time: tests compare them with it.

Shape legend: O = out features, K = reduction length of the GEMM matrix.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tnm_pipeline.training.convert.batch import Batch, forward, head, tensors_of
from tnm_pipeline.training.convert.calibration import model_errors, prunable_layer
from tnm_pipeline.training.convert.least_squares import MOST_KEPT_FOR_CHOLESKY
from tnm_pipeline.training.convert.passes import in_bfloat16
from tnm_pipeline.training.convert.patches import ENTRIES_AT_ONCE, output_size, stride
from tnm_pipeline.training.convert.plan import Plan
from tnm_pipeline.training.convert.precision import prefers_bfloat16
from tnm_pipeline.training.convert.problem import ROWS_AT_ONCE
from tnm_pipeline.training.convert.schedule import schedule
from tnm_pipeline.training.convert.sums import COLUMNS_AT_ONCE
from tnm_pipeline.training.layout import to_gemm
from tnm_pipeline.training.modes import evaluating
from tnm_pipeline.training.pattern import Pattern

_FLOAT, _DOUBLE = 4, 8  # bytes
_EXAMPLES = 2
_ROWS = 10  # (rows of a piece, K) matrices that a worker holds while it solves
_FACTORED = 3  # stacks of a piece's normal equations
_UNFOLDED = 2.4  # copies of the patches of some images, on the way to their rows
_NORMED = 4  # float32 equivalents of a batch norm's input, while its moments are taken


@dataclass(frozen=True)
class Memory:
    """What the tensors of a conversion take beyond the model and the batches, in bytes, at the moment when it is most.

    The process takes more: memory that has been freed is not all given back.

    Attributes:
        activations: of the passes, suspended.
        copies: masks of all layers; of the weights those that both models cannot share, or the whole reference.
        sums: of the layer in work, and what its method makes of them.
    """

    activations: int
    copies: int
    sums: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.activations + self.copies + self.sums


@dataclass(frozen=True)
class Held:
    """Bytes that one example holds while its pass waits at a stop.

    Attributes:
        alive: by all tensors that the pass has made and not freed.
        given: by the input of the stop, as float32 at least.
        patches: by all rows of a convolution's GEMM; 0 where these are the input itself.
        rows: how many these are.
    """

    alive: float
    given: float
    patches: float
    rows: int


class Alive(TorchDispatchMode):
    """Counts the tensors that operators make inside, until they are freed.

    Attributes:
        bytes: alive now.
        peak: the most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operator and note what is new."""
        keywords = kwargs or {}
        self._note(tree_leaves((args, dict(keywords))), counted=False)
        result = func(*args, **keywords)
        self._note(tree_leaves(result), counted=True)
        return result

    def _note(self, leaves: Sequence[object], *, counted: bool) -> None:
        for tensor in leaves:
            if not isinstance(tensor, Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self._known:
                continue
            size = storage.nbytes() if counted else 0
            self._known.add(storage._cdata)
            weakref.finalize(storage, self._forget, storage._cdata, size).atexit = False
            self.bytes += size
            self.peak = max(self.peak, self.bytes)

    def _forget(self, storage: int, size: int) -> None:
        self._known.discard(storage)
        self.bytes -= size


@torch.no_grad()
def estimate_memory(
    model: nn.Module,
    planned: Plan,
    batches: Sequence[Batch],
    *,
    reference: nn.Module | None = None,
    sequential: bool = True,
    retune_batch_norm: bool = True,
    reorder_channels: bool = True,
    workers: int = 1,
) -> Memory:
    """Foretell the peak; two examples are run.

    Methods other than ADMM are taken to need no more.

    Args:
        model: to be converted.
        planned: what will be done.
        batches: unlabelled inputs.
        reference: a second model that is held besides.
        sequential: as of the conversion.
        retune_batch_norm: likewise.
        reorder_channels: likewise; takes a copy of the reference.
        workers: likewise.

    Raises:
        CalibrationError: the model fails.
    """
    sizes = [_count(batch) * _elements_per_example(batch) for batch in batches]
    widest = max(batches, key=_elements_per_example)
    with evaluating(model), model_errors():
        order = schedule(model, planned.stops, widest, norms=retune_batch_norm)
        few = head(widest, _EXAMPLES)
        held, most = _measure(model, planned, list(order.calls), few)
        if prefers_bfloat16(model, planned.stops, order, batches[0]):
            # the peak stays: here it would have copies of weights, as if each example needed some
            held, _ = _measure(model, planned, list(order.calls), few, bfloat16=True)
    unit = _elements_per_example(widest)
    passes = _Passes(
        examples=sum(sizes) / unit,
        at_once=workers * max(sizes) / unit,
        models=2 if sequential or order.norms else 1,
        most=most,
    )
    peaks = [(0.0, 0.0)]
    waits = [held[stop] for stop in order.calls]
    for stop, here, after in zip(order.calls, waits, [*waits[1:], Held(0.0, 0.0, 0.0, 0)], strict=True):
        sums = _NORMED * passes.at_once * here.given
        kept = 0.0
        if stop in planned.stops:
            layer, pattern = prunable_layer(model, stop), planned.patterns[stop]
            sums, kept = _collecting(layer, here, passes, sequential=sequential, workers=workers)
            solving = _solving(layer, pattern, sequential=sequential, workers=workers)
            peaks.append((passes.waiting(after, here), solving))
        peaks.append((passes.waiting(here, here), max(sums, kept + passes.moving(here))))
        peaks.append((passes.waiting(after, after), kept + passes.moving(after)))
    activations, sums = max(peaks, key=sum)
    weights = {name: prunable_layer(model, name).weight for name in planned.stops}
    copies = sum(weight.numel() for weight in weights.values())
    if reference is not None:
        copies += (1 + reorder_channels) * sum(_bytes(parameter) for parameter in reference.parameters())
    else:
        copies += sum(_bytes(weight) for name, weight in weights.items() if order.calls.get(name, 0) > 1)
    return Memory(ceil(activations), copies, ceil(sums))


@dataclass(frozen=True)
class _Passes:
    """All passes; examples are counted as if all were those of the widest batch.

    Attributes:
        examples: of all batches.
        at_once: of the largest batch, times the workers.
        models: that run.
        most: bytes that one example takes at any moment of a pass.
    """

    examples: float
    at_once: float
    models: int
    most: float

    def waiting(self, dense: Held, converted: Held) -> float:
        """Bytes held while the models' passes wait."""
        return self.examples * (dense.alive + (converted.alive if self.models == 2 else 0.0))

    def moving(self, there: Held) -> float:
        """Bytes that some passes take on top of it while they run."""
        return self.at_once * max(0.0, self.most - there.alive)


def _collecting(
    layer: nn.Linear | nn.Conv2d, here: Held, passes: _Passes, *, sequential: bool, workers: int
) -> tuple[float, float]:
    """Bytes of a layer's sums while they are collected, and of those that outlive the layer."""
    rows, columns = to_gemm(layer.weight).shape
    square, rectangle = _DOUBLE * columns**2, _DOUBLE * rows * columns
    lagging = sequential and columns <= rows
    batch = passes.at_once * here.given
    every = stride(ceil(here.rows * passes.examples))
    patches = min(_FLOAT * ENTRIES_AT_ONCE * every, here.patches * passes.at_once / workers)
    slices = workers * _UNFOLDED * max(patches, here.patches) or min(batch, workers * _FLOAT * ENTRIES_AT_ONCE)
    # gram matrices of a half, the dense and the sparse model, half of one also as integers; the lags' likewise
    squares = 7 if lagging else 3.5 if sequential else 2.5
    products = workers * _FLOAT * columns * min(columns, COLUMNS_AT_ONCE)
    grams = squares * square + products + (5 if sequential else 2) * rectangle + slices
    residuals = 4 * rectangle + batch + slices if sequential else 0.0
    return max(grams + lagging * batch, residuals), (5 if lagging else 3 if sequential else 2) * square


def _solving(layer: nn.Linear | nn.Conv2d, pattern: Pattern, *, sequential: bool, workers: int) -> float:
    """Bytes of a layer's sums and of what ADMM makes of them."""
    rows, columns = to_gemm(layer.weight).shape
    # own, sequential and blended objectives, lags, a half in single precision; while damping is tried, that half, the
    # other and a centred one, or in a search, in single precision, the matrix, two inverses, a third and its factor
    squares = (5.0 if sequential and columns <= rows else 3.0 if sequential else 2.0) + 0.5 + 3.0
    rectangles = 7.9 if sequential else 6.1
    most = columns * pattern.density
    factored = _FACTORED * most**2 if most <= MOST_KEPT_FOR_CHOLESKY else 0.0
    pieces = workers * min(rows, ROWS_AT_ONCE) * (_ROWS * columns + factored)
    return _DOUBLE * (squares * columns**2 + rectangles * rows * columns + pieces)


def _measure(
    model: nn.Module, planned: Plan, stops: Sequence[str], few: Batch, *, bfloat16: bool = False
) -> tuple[dict[str, Held], float]:
    """What one example holds at each stop, and the most that it holds anywhere."""
    count = max(len(tensor) for _, tensor in tensors_of(few))
    alive, held = Alive(), {}
    clones: dict[str, int] = {}

    def arrive(stop: str) -> Callable[..., None]:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = args[0] if args else kwargs["input"]
            patches, rows = 0, 0
            if isinstance(layer, nn.Conv2d):
                images = inputs if inputs.dim() == 4 else inputs[None]
                rows = prod(output_size(layer, images))
                patches = rows * layer.weight[0].numel() * _FLOAT if prod(layer.kernel_size) > 1 else 0
            given = inputs.numel() * max(_FLOAT, inputs.element_size())
            held[stop] = Held((alive.bytes + clones.get(stop, 0)) / count, given / count, patches, rows)
            clones[stop] = clones.get(stop, 0) + _bytes(inputs)

        return before

    handles = []
    for stop in stops:
        for name in planned.stops.get(stop, (stop,)):
            module = model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(arrive(stop), with_kwargs=True))
    try:
        with alive, in_bfloat16(bfloat16):
            forward(model, few)
    finally:
        for handle in handles:
            handle.remove()
    return held, alive.peak / count


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _count(batch: Batch) -> int:
    return len(next(tensors_of(batch))[1])


def _elements_per_example(batch: Batch) -> int:
    """What activations grow with: tokens, pixels."""
    _, tensor = next(tensors_of(batch))
    return tensor[0].numel()
