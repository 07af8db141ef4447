"""convert(): a dense or unstructured model becomes N:M, layer by layer, in the order in which its layers run."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from tnm_pipeline.training.convert.batch import Batch, CalibrationError, check_batches, head
from tnm_pipeline.training.convert.calibration import one_thread, prunable_layer
from tnm_pipeline.training.convert.choosing import Scene, plan_by_preference
from tnm_pipeline.training.convert.group import Group
from tnm_pipeline.training.convert.journal import Journal, identify
from tnm_pipeline.training.convert.methods import find_method
from tnm_pipeline.training.convert.plan import Plan, PlanError
from tnm_pipeline.training.convert.reorder import Reordering, find_reorderings, pack, reorder, unpack
from tnm_pipeline.training.convert.result import Conversion
from tnm_pipeline.training.convert.rotation import Rotation
from tnm_pipeline.training.convert.schedule import Schedule, schedule
from tnm_pipeline.training.convert.walk import Walk
from tnm_pipeline.training.convert.work import measure_work
from tnm_pipeline.training.layout import PRUNABLE
from tnm_pipeline.training.masks import Solver
from tnm_pipeline.training.modes import evaluating
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.processes import first_says
from tnm_pipeline.training.selection import FOR_CONVERSION, Selection, select


@torch.no_grad()
def convert(
    model: nn.Module,
    pattern: Pattern | Plan,
    batches: Sequence[Batch],
    *,
    method: str = "admm",
    reference: nn.Module | None = None,
    selection: Selection | None = None,
    solver: Solver = "exact",
    sequential: bool = True,
    retune_batch_norm: bool = True,
    reorder_channels: bool = True,
    workers: int = 1,
    journal: Path | None = None,
    on_layer: Callable[[str, int, int], None] | None = None,
) -> Conversion:
    """Make a model's weights N:M and repair what that breaks, from unlabelled inputs alone.

    The dense and the converted model run side by side, once, over all batches, and stop before each layer until it is
    converted; the dense one alone where nothing looks at the other: not sequential, and no batch norm is re-tuned.
    Memory: the activations of the models at one stop and one layer's sums. Both models share each weight until the
    passes through the dense one need it no more.

    The same inputs give the same bits for any number of workers, and of processes if torch.distributed is initialised;
    every process must be given the same arguments. PyTorch's own threads are set to 1 meanwhile.

    Args:
        model: changed in place: weights, biases, running statistics of batch norms. Its modules, modes and gradients
            stay what they are. After an error it is half converted.
        pattern: the rule, or a plan with one for each layer.
        batches: unlabelled inputs. Padding is what `attention_mask` leaves out, and does not count.
        method: a name in `METHODS`.
        reference: the model whose layer outputs are the targets; default: `model` as it is now. For an unstructured
            checkpoint, give the dense model it came from if there is one.
        selection: which layers, if `pattern` is no plan; default: all but the first and the last.
        solver: of the masks.
        sequential: fit each layer also to the inputs that the converted layers before it really give, rather than to
            those of the dense model alone.
        retune_batch_norm: set running statistics so that outputs keep the dense model's mean and spread.
        reorder_channels: renumber channels between layers and rotate attention heads first, where the dataflow allows
            it, so that the masks keep more. The network computes the same, with its weights in another order and basis,
            which `Conversion.reorderings` has.
        workers: threads that share the work.
        journal: folder that keeps finished layers, so that a killed conversion goes on from there. Several processes
            must see the same folder.
        on_layer: called after each layer with its name, its number from 1 on, and their count.

    Returns:
        The report and the masks.

    Raises:
        CalibrationError: no batches, or NaN in them or in a layer, or the model fails on them.
        MethodError: an unknown method, or one that cannot follow the pattern.
        JournalError: the folder is another conversion's, damaged, or not the same for all processes.
        SelectionError, PlanError: nothing to convert.
        ValueError: a reference that has other layers.
    """
    check_batches(batches)
    group = Group.here(workers)
    if group.size > len(batches):
        raise CalibrationError(
            f"{group.size} processes share {len(batches)} batches: start at most {len(batches)}, or make the batches "
            "smaller"
        )
    plan = pattern if isinstance(pattern, Plan) else plan_for(model, pattern, batches[0], selection)
    if not plan.patterns:
        raise PlanError(
            f"the plan leaves all {len(plan.layers)} layers dense ({plan.rule}), so there is nothing to convert: plan "
            "with a less sparse pattern, or allow more"
        )
    chosen_method = find_method(method, plan.patterns.values())
    if reference is model:
        reference = None
    if reference is not None:
        _check_reference(reference, model, plan)
    settings = {
        "patterns": {name: str(one) for name, one in plan.patterns.items()},
        "method": method,
        "solver": solver,
        "sequential": sequential,
        "retune_batch_norm": retune_batch_norm,
        "reorder_channels": reorder_channels,
    }
    models = [model] if reference is None else [model, reference]
    book = Journal(journal, identify(models, batches, settings)) if journal is not None else None
    with evaluating(*models), one_thread():
        reorderings = first_says(lambda: _kept_or_found(model, plan, batches[0], book)) if reorder_channels else []
        reorder(model, reorderings)
        order = schedule(model, plan.stops, batches[0], norms=retune_batch_norm)
        if reference is None:
            dense = _twin(model, plan, order)
        else:
            dense = copy.deepcopy(reference) if reorderings else reference
            reorder(dense, reorderings)
        walk = Walk(model, dense, plan, chosen_method, solver, group, order, sequential, book, on_layer)
        conversion = walk.run({index: batches[index] for index in group.mine(len(batches))}, batches[0])
    return replace(conversion, reorderings=tuple(reorderings))


@torch.no_grad()
def plan_for(model: nn.Module, pattern: Pattern, example: Batch, selection: Selection | None = None) -> Plan:
    """One pattern for every layer that the rules leave and that it fits.

    Args:
        model: in any mode.
        pattern: the rule.
        example: a batch, of which the first examples are run.
        selection: default: all layers but the first and the last.

    Raises:
        SelectionError, PlanError: no layer is left.
    """
    choice = select(model, pattern, selection or FOR_CONVERSION)
    return plan_by_preference(Scene(model, choice, measure_work(model, head(example, 2)), [pattern]))


def _kept_or_found(model: nn.Module, plan: Plan, example: Batch, book: Journal | None) -> list[Reordering | Rotation]:
    """The reorderings that the finished layers are in; else new ones, which on another machine may be others."""
    start = book.read_start() if book is not None else None
    if start is not None:
        return unpack(*start)
    found = find_reorderings(model, plan, example)
    if book is not None:
        book.write_start(*pack(found))
    return found


def _twin(model: nn.Module, plan: Plan, order: Schedule) -> nn.Module:
    """A copy that shares what the conversion does not change before it is needed for the last time.

    Weights of layers that run several times in a pass are copied: they may run more often on another batch.
    """
    layers = {stop: [prunable_layer(model, name) for name in names] for stop, names in plan.stops.items()}
    own = {id(layer.bias) for group in layers.values() for layer in group}
    own |= {id(group[0].weight) for stop, group in layers.items() if order.calls.get(stop, 0) > 1}
    shared = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in own}
    return copy.deepcopy(model, shared)


def _check_reference(reference: nn.Module, model: nn.Module, plan: Plan) -> None:
    """Refuse a reference without the chosen layers, before any work is done."""
    theirs = {name: module.weight.shape for name, module in reference.named_modules() if isinstance(module, PRUNABLE)}
    for name in plan.stops:
        shape = prunable_layer(model, name).weight.shape
        if theirs.get(name) != shape:
            other = f"has shape {tuple(theirs[name])}" if name in theirs else "is absent"
            raise ValueError(
                f"layer {name} has shape {tuple(shape)} in the model and {other} in the reference: "
                "give the dense model of the same architecture"
            )
