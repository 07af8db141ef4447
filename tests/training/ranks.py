"""What the processes of the distributed tests do: `torchrun ranks.py WHAT FOLDER`.

Results go to FOLDER/WHAT.PROCESSES.RANK.pt.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

from tnm_pipeline.training import sharded
from tnm_pipeline.training.distributed import full
from tnm_pipeline.training.processes import leave
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.sharded import load_sharded, save_sharded
from tnm_pipeline.training.sparsify import Sparsifier
from tnm_pipeline.training.state import save_state

STEPS = 12
BATCH = 32
RECIPES = {
    "dynamic": ("2:4-T", Recipe("mine", refresh_every=2, decay=5e-3)),
    "fading": ("2:4-T", Recipe("mine", refresh_every=2, decay=5e-3, ramp=(0.2, 0.8))),
    "soft": ("2:4", Recipe("mine", refresh_every=2, soft_threshold=True)),
}


def net(seed: int = 0) -> nn.Sequential:
    """Two processes cut its 6, 20 and 12 rows, and so blocks of 4 x 4, in halves; four leave one without channels."""
    torch.manual_seed(seed)
    block = nn.Sequential(nn.Linear(20, 12), nn.Dropout(0.0), nn.ReLU())
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(96, 20), nn.ReLU(), block, nn.Linear(12, 3))


def shard(model: nn.Sequential) -> nn.Sequential:
    """A block, a layer by itself, and the rest."""
    fully_shard(model[4])
    fully_shard(model[2])
    fully_shard(model)
    return model


def train(
    model: nn.Module,
    optimizer: Optimizer,
    first: int = 0,
    steps: int = STEPS,
    average: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """The same batches for any number of processes, each of which takes its share; returns the whole batch's losses."""
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(BATCH, 4, 6, 6, generator=generator).chunk(ranks)[rank]
        targets = torch.randint(3, (BATCH,), generator=generator).chunk(ranks)[rank]
        loss = F.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total = loss.detach() / ranks
        if ranks > 1:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses


def whole(model: nn.Module) -> dict[str, Tensor]:
    return {name: full(tensor).clone() for name, tensor in model.state_dict().items()}


def learn(way: Callable[[nn.Sequential], nn.Module], recipe: str) -> dict[str, Any]:
    """Train to the end, with a forward pass before the end that leaves FSDP2 with whole weights."""
    model = net()
    wrapped = way(model)
    optimizer = SGD(wrapped.parameters(), lr=0.1, momentum=0.9)
    pattern, rules = RECIPES[recipe]
    sparsifier = Sparsifier(model, optimizer, pattern, rules, total_steps=STEPS)
    losses = train(wrapped, optimizer)
    trained = whole(model)
    with torch.no_grad():
        wrapped(torch.zeros(1, 4, 6, 6))
    layers, masks = sparsifier.finalize()
    return {
        "losses": losses,
        "flips": [refresh.flip_rate for refresh in sparsifier.telemetry],
        "trained": trained,
        "masks": masks,
        "weights": whole(model),
        "layers": [(row.name, row.type, row.shape, row.violations, row.violations_transposed) for row in layers],
    }


def error_of(do: Callable[[], object]) -> str:
    try:
        do()
    except Exception as error:  # whatever it is, the test looks
        return f"{type(error).__name__}: {error}"
    return "no error"


def masks_of(recipe: Recipe, seed: int, wrap: bool, disturb: Callable[[nn.Sequential, Sparsifier], None]) -> Any:
    """Masks after training, with something done to the model or the Sparsifier before."""
    model = net(seed)
    optimizer = SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", recipe)
    wrapped = DistributedDataParallel(model) if wrap else model
    disturb(model, sparsifier)
    train(wrapped, optimizer)
    return sparsifier.masks()


def nothing(*_: object) -> None:
    """Disturb nothing."""


def nudge(model: nn.Sequential, _: Sparsifier) -> None:
    """Other weights in the second process alone."""
    with torch.no_grad():
        model.get_parameter("4.0.weight").add_(0.1 * dist.get_rank())


def skip_ahead(_: nn.Sequential, sparsifier: Sparsifier) -> None:
    """A state that only the first process loads."""
    if dist.get_rank() == 0:
        sparsifier.load_state_dict({"step": 7, "telemetry": []})


def shard_too_late() -> None:
    model = net()
    optimizer = SGD(model.parameters(), lr=0.1)
    Sparsifier(model, optimizer, "2:4-T")
    train(shard(model), optimizer)


def alone() -> dict[str, Tensor]:
    """A model of its own in each process."""
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    own = groups[dist.get_rank()]
    assert isinstance(own, dist.ProcessGroup)
    model = net(dist.get_rank())
    optimizer = SGD(model.parameters(), lr=0.1)
    sparsifier = Sparsifier(model, optimizer, "2:4-T", RECIPES["dynamic"][1], process_group=own)
    train(model, optimizer)
    return sparsifier.masks()


def cut_by_columns() -> None:
    model = parallelize_module(net(), init_device_mesh("cpu", (dist.get_world_size(),)), {"2": ColwiseParallel()})
    Sparsifier(model, SGD(model.parameters(), lr=0.1), "2:4-T")


def flatten() -> None:
    model = FullyShardedDataParallel(net())
    Sparsifier(model, SGD(model.parameters(), lr=0.1), "2:4-T")


def learning(_: Path) -> dict[str, Any]:
    """Everything about masks on two processes."""
    dynamic, static = RECIPES["dynamic"][1], Recipe("mine")
    rank = dist.get_rank()
    return {
        "ddp": learn(DistributedDataParallel, "dynamic"),
        **{name: learn(shard, name) for name in RECIPES},
        "other seeds": masks_of(static, rank, True, nothing),
        "other seeds alone": error_of(lambda: masks_of(static, rank, False, nothing)),
        "nudged": error_of(lambda: masks_of(dynamic, 0, True, nudge)),
        "skipped ahead": error_of(lambda: masks_of(dynamic, 0, True, skip_ahead)),
        "alone": alone(),
        "sharded too late": error_of(shard_too_late),
        "cut by columns": error_of(cut_by_columns),
        "flattened": error_of(flatten),
    }


def prepared(seed: int = 0) -> tuple[nn.Sequential, Optimizer, Sparsifier]:
    """Ready to train, sharded if there are several processes; the dropout draws random numbers."""
    model = net(seed)
    model.get_submodule("4.1").p = 0.3  # type: ignore[assignment]  # a module's attributes are taken for tensors
    if dist.is_initialized():
        shard(model)
        torch.manual_seed(dist.get_rank())
    optimizer = AdamW(model.parameters(), lr=0.01)
    return model, optimizer, Sparsifier(model, optimizer, *RECIPES["fading"], total_steps=STEPS)


def saving(folder: Path) -> dict[str, Any]:
    """Save after 3 and after 6 steps, train to the end."""
    model, optimizer, sparsifier = prepared()
    for first in (0, 3):
        train(model, optimizer, first, 3)
        save_sharded(folder / "checkpoints", model, optimizer, sparsifier, {"step": first + 3})
    saved = whole(model)
    train(model, optimizer, 6, 6)
    return {"saved": saved, "end": whole(model), "state": sparsifier.state_dict()}


def going_on(folder: Path) -> dict[str, Any]:
    """Load what `saving` saved, train to the end."""
    model, optimizer, sparsifier = prepared(seed=1)
    progress = load_sharded(folder / "checkpoints", model, optimizer, sparsifier)
    assert progress is not None
    loaded, step = whole(model), sparsifier.step
    train(model, optimizer, progress["step"], STEPS - progress["step"])
    return {"loaded": loaded, "step": step, "end": whole(model), "state": sparsifier.state_dict()}


def failing(folder: Path) -> dict[str, str]:
    """What each process is told where one of them cannot write or read."""
    model, optimizer, sparsifier = prepared()
    checkpoints = folder / "checkpoints"

    def save() -> None:
        save_sharded(checkpoints, model, optimizer, sparsifier, {"step": 0})

    def load() -> None:
        load_sharded(checkpoints, model, optimizer, sparsifier)

    def with_fault(name: str, rank: int, do: Callable[[], None]) -> str:
        """The error where a function of the module fails in one process."""
        right = getattr(sharded, name)
        if dist.get_rank() == rank:
            setattr(sharded, name, fail)
        try:
            return error_of(do)
        finally:
            setattr(sharded, name, right)

    def fail(*_: object) -> None:
        raise PermissionError(13, "Permission denied", f"of process {dist.get_rank()}")

    save()
    plain = net()
    return {
        "clearing": with_fault("_clear_the_next", 0, save),
        "writing": with_fault("write_atomically", 1, save),
        "removing": with_fault("_remove_all_but", 0, save),
        "finding": with_fault("_newest", 0, load),
        "reading": with_fault("check_same_sparsity", 1, load),
        "state": error_of(lambda: save_state(folder, plain, SGD(plain.parameters()), {})),
        "after": error_of(load),
    }


def dying(folder: Path) -> dict[str, Any]:
    """Save after 3 steps, and be killed while saving after 6: the last process, at an event that DIE_AT names."""
    event, part = os.environ["DIE_AT"].split(":")

    def watch(name: str, arguments: tuple[object, ...]) -> None:
        if name == event and any(part in str(argument) for argument in arguments):
            os.kill(os.getpid(), signal.SIGKILL)

    model, optimizer, sparsifier = prepared()
    train(model, optimizer, 0, 3)
    save_sharded(folder / "checkpoints", model, optimizer, sparsifier, {"step": 3})
    train(model, optimizer, 3, 3)
    if int(os.environ.get("RANK", "0")) == int(os.environ.get("WORLD_SIZE", "1")) - 1:
        sys.addaudithook(watch)
    save_sharded(folder / "checkpoints", model, optimizer, sparsifier, {"step": 6})
    return {}


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    ranks, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
    torch.save(globals()[what](folder), folder / f"{what}.{ranks}.{rank}.pt")
    if dist.is_initialized():
        leave()


if __name__ == "__main__":
    main()
