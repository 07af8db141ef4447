"""The state of a training that is under way: everything needed to go on bit for bit, in one file.

Tensors go under `model/`, `optimizer/` and, for each process that trains, `rng/RANK/`; everything else goes into the
JSON record of the header.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor, nn
from torch.optim import Optimizer

from tnm_pipeline.training.atomic import write_atomically
from tnm_pipeline.training.checkpoint import CheckpointError, misfits
from tnm_pipeline.training.processes import count, each_says, first_says, rank
from tnm_pipeline.training.sparsify import Sparsifier

RandomState = tuple[dict[str, Tensor], dict[str, Any]]
_RECORD = "tnm_pipeline.training"
_START_OVER = "delete it to start over"


def save_state(
    path: Path, model: nn.Module, optimizer: Optimizer, progress: dict[str, Any], sparsifier: Sparsifier | None = None
) -> None:
    """Write the state atomically: a kill leaves the one before or this one. All processes must call it.

    The first one writes; the others, whose weights and optimizer are the same, give it their random generators and
    wait, since one that ends ends all.

    Args:
        path: a `.safetensors` file.
        model: as it trains, masks included.
        optimizer: any torch optimizer whose state holds tensors and JSON-able values.
        progress: JSON-able counters of the loop.
        sparsifier: of the model; None: the training is dense.

    Raises:
        OSError: in all processes, the first cannot write.
    """
    facts = {"progress": progress, "sparsity": sparsity_facts(sparsifier)}
    generators = each_says(random_state())
    first_says(lambda: write_atomically(path, _pack(model, optimizer, facts, generators)))


def _pack(model: nn.Module, optimizer: Optimizer, facts: dict[str, Any], generators: Sequence[RandomState]) -> bytes:
    # Cloned, because tied weights and buffers may share memory, which safetensors refuses.
    tensors = {f"model/{name}": tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    packed = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in packed["state"].items():
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value.detach().cpu().clone()
            else:
                scalars.setdefault(str(index), {})[key] = value
    for process, (states, _) in enumerate(generators):
        tensors |= {f"rng/{process}/{name}": state for name, state in states.items()}
    record = {
        **facts,
        "optimizer": {
            "type": type(optimizer).__name__,
            "param_groups": packed["param_groups"],
            "scalars": scalars,
        },
        "rng": [others for _, others in generators],
    }
    return serialize(tensors, metadata={_RECORD: json.dumps(record)})


def load_state(
    path: Path, model: nn.Module, optimizer: Optimizer, sparsifier: Sparsifier | None = None
) -> dict[str, Any]:
    """Put everything back as `save_state` found it; all processes must call it.

    Random generators are put back where the number of processes is the same; else they stay as they are.

    Args:
        path: that `save_state` wrote, for the same model and optimizer.
        model: changed in place.
        optimizer: changed in place.
        sparsifier: of the model, not changed; None: the training is dense.

    Returns:
        The progress counters.

    Raises:
        CheckpointError: not a state file, or that of another model, optimizer, pattern or recipe; nothing has changed.
    """
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {})[_RECORD])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        sparsity, stepper = record["sparsity"], record["optimizer"]["type"]
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} is not a training state of this version ({error}); {_START_OVER}") from error
    check_same_sparsity(path, sparsity, sparsifier, _START_OVER)
    if stepper != type(optimizer).__name__:
        raise CheckpointError(
            f"{path} was saved while training with {stepper}, this training is with {type(optimizer).__name__}: go on "
            f"with the former, or {_START_OVER}"
        )
    weights = {name.removeprefix("model/"): tensor for name, tensor in tensors.items() if name.startswith("model/")}
    problems = misfits(model, weights)
    if problems:
        raise CheckpointError(f"{path} is the state of another model: {problems}; {_START_OVER}")
    model.load_state_dict(weights)
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = tensor
    for index, values in record["optimizer"]["scalars"].items():
        state.setdefault(int(index), {}).update(values)
    optimizer.load_state_dict({"state": state, "param_groups": record["optimizer"]["param_groups"]})
    if len(record["rng"]) == count():
        own = f"rng/{rank()}/"
        states = {name.removeprefix(own): tensor for name, tensor in tensors.items() if name.startswith(own)}
        set_random_state(states, record["rng"][rank()])
    progress: dict[str, Any] = record["progress"]
    return progress


def sparsity_facts(sparsifier: Sparsifier | None) -> dict[str, Any]:
    """What a training is that `check_same_sparsity` compares: `pattern` and `recipe`, as JSON gives them back."""
    if sparsifier is None:
        return {"pattern": "dense", "recipe": {}}
    recipe = asdict(replace(sparsifier.recipe, summary=""))  # which is for people
    return {"pattern": str(sparsifier.pattern), "recipe": json.loads(json.dumps(recipe))}


def check_same_sparsity(path: Path, record: Mapping[str, Any], sparsifier: Sparsifier | None, otherwise: str) -> None:
    """Refuse to go on with what was saved while training for another pattern, by another recipe, or densely.

    Args:
        path: where the record is from, for the message.
        record: holds what `sparsity_facts` said when it was saved.
        sparsifier: of this training; None: it is dense.
        otherwise: what to do instead of training as before, for the message.

    Raises:
        CheckpointError: names what differs.
    """
    facts = sparsity_facts(sparsifier)
    saved, own = ({"pattern": one["pattern"], **one["recipe"]} for one in (record, facts))
    comparable = own if record["recipe"] and facts["recipe"] else ("pattern",)
    differ = [key for key in comparable if saved.get(key) != own[key]]
    if differ:
        before, now = (", ".join(f"{key} {one.get(key)}" for key in differ) for one in (saved, own))
        raise CheckpointError(
            f"{path} was saved while training with {before}, this training was made for {now}: go on with the former, "
            f"or {otherwise}"
        )


def random_state() -> RandomState:
    """The global generators of this process: those of torch as tensors by name, the others JSON-able."""
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda/{device}": state for device, state in enumerate(torch.cuda.get_rng_state_all())}
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  # user code may draw from the global generator
    return tensors, {"python": random.getstate(), "numpy": _jsonable(numpy_state)}


def set_random_state(tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Undo `random_state`.

    Args:
        tensors: the first of its results; further ones are ignored.
        record: the second.
    """
    torch.set_rng_state(tensors["torch"])
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            if f"cuda/{device}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda/{device}"], device)
    version, internal, gauss = record["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(record["numpy"])  # noqa: NPY002  # as in random_state


def _jsonable(value: Any) -> Any:
    """Numpy arrays and integers inside nested dicts, as plain lists and integers."""
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    return value.item() if isinstance(value, np.generic) else value
