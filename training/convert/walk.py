"""The dense and the converted model walk through the calibration data side by side, one layer after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tnm_pipeline.training.convert.batch import Batch, CalibrationError, attended, head
from tnm_pipeline.training.convert.batch_norm import BatchNorm, match_statistics, moments
from tnm_pipeline.training.convert.calibration import prunable_layer
from tnm_pipeline.training.convert.collect import Collector, Seen
from tnm_pipeline.training.convert.damping import TRIED, Halves
from tnm_pipeline.training.convert.dataflow import held_tensor
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.journal import Journal, JournalError
from tnm_pipeline.training.convert.layer import convert_layer
from tnm_pipeline.training.convert.objective import Objective
from tnm_pipeline.training.convert.passes import Passes
from tnm_pipeline.training.convert.plan import Plan
from tnm_pipeline.training.convert.precision import prefers_bfloat16
from tnm_pipeline.training.convert.problem import Method
from tnm_pipeline.training.convert.residual import Residual, find_residual
from tnm_pipeline.training.convert.result import Conversion, ConvertedLayer
from tnm_pipeline.training.convert.schedule import Schedule
from tnm_pipeline.training.convert.tracing import DataflowError, trace
from tnm_pipeline.training.convert.trim import make_room
from tnm_pipeline.training.layout import to_gemm
from tnm_pipeline.training.masks import Solver

# Of the error of the branch that a residual layer is added to, how much the layer is fitted to repair. All of it
# overfits: the layer's inputs explain only a part of that error.
RESIDUAL_SHARE = 0.5
_MASK = "mask"  # in the journal, among the names of a model's tensors, which have a dot


@dataclass(eq=False)
class Walk:
    """One conversion on its way."""

    model: nn.Module
    reference: nn.Module
    plan: Plan
    method: Method
    solver: Solver
    group: Group
    schedule: Schedule
    sequential: bool
    journal: Journal | None
    on_layer: Callable[[str, int, int], None] | None

    def run(self, batches: Mapping[int, Batch], example: Batch) -> Conversion:
        """Convert all layers.

        Args:
            batches: of this process, by their number among all.
            example: a batch that every process has.
        """
        self._check_journal()
        residuals = _residuals(self.model, list(self.plan.stops), example) if self.sequential else {}
        stops = {stop: self.plan.stops.get(stop, (stop,)) for stop in self.schedule.calls}
        endpoints = {stop: residual.partner for stop, residual in residuals.items()}
        collector = Collector(self.group, sequential=self.sequential)
        layers: list[ConvertedLayer] = []
        masks: dict[str, Tensor] = {}
        count = sum(stop not in self.schedule.norms for stop in self.schedule.calls)
        with ExitStack() as stack:
            with self._failing("the start", 0):
                followed = [self.reference, self.model] if self.sequential or self.schedule.norms else [self.reference]
                rounded = prefers_bfloat16(self.reference, stops, self.schedule, example)
                calls, workers = self.schedule.calls, self.group.workers
                sides = [
                    stack.enter_context(Passes(one, batches, stops, calls, endpoints, workers, bfloat16=rounded))
                    for one in followed
                ]
                dense, sparse = sides[0], sides[-1]
            for stop in self.schedule.calls:
                kept = self.journal.read(stop) if self.journal is not None else None
                if kept is not None:
                    self._leave(stop, dense, len(layers))
                    record = self._restore(stop, *kept, masks)
                elif stop in self.schedule.norms:
                    record = self._match(stop, dense, sparse)
                else:
                    layer = prunable_layer(self.reference, stop)
                    width = to_gemm(layer.weight).shape[1]
                    seen = self._seen(stop, dense, sparse, residuals.get(stop))
                    make_room(width)
                    objectives = collector.collect(stop, layer, seen)
                    del seen
                    self._leave(stop, dense, len(layers))  # its inputs are not needed again: memory for what follows
                    make_room(width)
                    record = self._convert(stop, *objectives, partial(collector.halves, TRIED), masks)
                    del objectives
                if stop not in self.schedule.norms:
                    layers.append(ConvertedLayer.from_dict(record))
                    if self.on_layer is not None:
                        self.on_layer(stop, len(layers), count)
                with self._failing(f"layer {stop}", len(layers)):
                    dense.leave(stop)
                    sparse.leave(stop)
        return Conversion(layers, masks, self.plan, len(self.schedule.norms))

    def _check_journal(self) -> None:
        """Refuse to start where processes would wait for each other at different layers."""
        if self.journal is None:
            return
        device = next(self.model.parameters()).device
        seen = sum(map(self.journal.has, self.schedule.calls))
        most, least = int(self.group.largest(seen, device)), -int(self.group.largest(-seen, device))
        if most != least:
            raise JournalError(
                f"process {self.group.rank} finds {seen} finished steps in the journal, others find {least} to "
                f"{most}: put it into a folder that all processes see"
            )

    @contextmanager
    def _failing(self, place: str, done: int) -> Iterator[None]:
        """Say where in the conversion the model's own code failed."""
        try:
            yield
        except (CalibrationError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the user's model may raise anything
            kept = "" if self.journal is None else f"; finished layers kept: {done}"
            raise CalibrationError(
                f"the model fails on the calibration data after {place}: {type(error).__name__}: {error}{kept}"
            ) from error

    def _leave(self, stop: str, dense: Passes, done: int) -> None:
        """Let the dense model's passes leave a layer whose weight changes next.

        Where both models share the weight, passes that have not come by get a copy. Those that have must not come back.
        """
        with self._failing(f"layer {stop}", done):
            dense.leave(stop)
        if stop in self.schedule.norms or not _share_weight(self.model, self.reference, stop):
            return
        layers = [prunable_layer(self.reference, name) for name in self.plan.stops[stop]]
        if dense.will_meet(stop):
            weight = nn.Parameter(layers[0].weight.clone(), requires_grad=False)
            for layer in layers:
                layer.weight = weight
            return
        for layer in layers:  # of a model that nobody else has
            layer.register_forward_pre_hook(partial(_refuse, stop))

    def _seen(self, stop: str, dense: Passes, sparse: Passes, residual: Residual | None) -> list[Seen]:
        """What the passes that have come by a layer were given, batch by batch."""
        scale = residual.affine(self.reference)[0] if residual is not None else None
        if scale is not None and isinstance(prunable_layer(self.reference, stop), nn.Conv2d):
            scale = scale[:, None, None]  # of (O, H, W); other outputs are (..., O)
        seen: list[Seen] = []
        for theirs, ours in zip(dense.passes, sparse.passes, strict=True):
            wanted = theirs.inputs_of(stop)
            given = ours.inputs_of(stop) if self.sequential else wanted
            correction = None
            if scale is not None and wanted and given:
                correction = partial(_correction, theirs.partner_of(stop), ours.partner_of(stop), scale)
            seen.append(Seen(wanted, given, correction, attended(theirs.batch), theirs.index % 2))
        return seen

    def _convert(
        self,
        stop: str,
        own: Objective,
        sequential: Objective,
        halves: Halves,
        masks: dict[str, Tensor],
    ) -> dict[str, Any]:
        layer, dense = prunable_layer(self.model, stop), prunable_layer(self.reference, stop)
        names = self.plan.stops[stop]
        converted, mask = convert_layer(
            stop,
            layer,
            dense,
            own,
            sequential,
            halves=halves,
            pattern=self.plan.patterns[stop],
            method=self.method,
            solver=self.solver,
            group=self.group,
            normed=stop in self.schedule.normed,
            tied=[(prunable_layer(self.model, name), prunable_layer(self.reference, name)) for name in names[1:]],
        )
        masks.update(dict.fromkeys(names, mask))
        record = replace(converted, tied=names[1:]).to_dict()
        tensors = {f"{stop}.weight": layer.weight, _MASK: mask}
        for name in names:
            bias = prunable_layer(self.model, name).bias
            if bias is not None:
                tensors[f"{name}.bias"] = bias
        self._note(stop, tensors, record)
        return record

    def _match(self, stop: str, dense: Passes, sparse: Passes) -> dict[str, Any]:
        norm = cast(BatchNorm, self.model.get_submodule(stop))
        theirs, ours = (
            moments(stop, [x for one in side.passes for x in one.inputs_of(stop)], self.group)
            for side in (dense, sparse)
        )
        match_statistics(norm, cast(BatchNorm, self.reference.get_submodule(stop)), ours, theirs)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self._note(stop, {f"{stop}.running_mean": norm.running_mean, f"{stop}.running_var": norm.running_var}, {})
        return {}

    def _note(self, stop: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        if self.journal is not None and self.group.rank == 0:
            self.journal.write(stop, tensors, record)

    def _restore(
        self, stop: str, tensors: Mapping[str, Tensor], record: dict[str, Any], masks: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Put back what a stop had finished before a kill."""
        for name, tensor in tensors.items():
            if name == _MASK:
                mask = tensor.to(prunable_layer(self.model, stop).weight.device)
                masks.update(dict.fromkeys(self.plan.stops[stop], mask))
            else:
                held_tensor(self.model, name).copy_(tensor)
        return record


def _share_weight(model: nn.Module, reference: nn.Module, stop: str) -> bool:
    return prunable_layer(model, stop).weight is prunable_layer(reference, stop).weight


def _refuse(stop: str, *_: object) -> None:
    raise CalibrationError(
        f"layer {stop} runs more often on one calibration batch than on the first: its execution depends on the data; "
        "give the dense model as the reference too, or leave the layer out"
    )


def _residuals(model: nn.Module, names: Sequence[str], example: Batch) -> dict[str, Residual]:
    """The residual connections whose other branch is known when the layer is called; none if there is no dataflow."""
    try:
        flow = trace(model, head(example, 2))
    except DataflowError:
        return {}
    found = {name: find_residual(flow, name) for name in names}
    return {name: one for name, one in found.items() if one is not None and one.before}


def _correction(wanted: Tensor, given: Tensor, scale: Tensor) -> Tensor:
    """The branch's error in units of the layer's output; channels that are silenced on the way get none."""
    by = torch.where(scale == 0, 0.0, RESIDUAL_SHARE / scale).to(wanted.dtype)
    return (wanted - given).mul_(by)
