"""Training on several processes, on the CPU with gloo: the same masks everywhere, those of one process."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import SGD

from tests.training import ranks
from tnm_pipeline.training.distributed import ShardingError, check_in_sync, digest, full, local, local_part, plain_type
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.sparsify import Sparsifier

LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "ACCELERATE_USE_CPU"}


def launch(processes: int, *command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    launcher = [*LAUNCH, str(processes)] if processes > 1 else []
    return subprocess.run(
        [sys.executable, *launcher, *map(str, command)],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def results(what: str, processes: int, folder: Path) -> list[Any]:
    """What a function of `ranks` returned in every process."""
    done = launch(processes, ranks.__file__, what, folder)
    assert done.returncode == 0, done.stderr
    return [
        torch.load(folder / f"{what}.{processes}.{rank}.pt", weights_only=False) for rank in range(processes)
    ]  # of our own, a moment ago


def assert_equal(mine: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert mine.keys() == other.keys()
    for name, tensor in mine.items():
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return results("learning", 2, tmp_path_factory.mktemp("learned"))


@pytest.mark.slow
@pytest.mark.parametrize(("way", "recipe"), [("ddp", "dynamic"), *((recipe, recipe) for recipe in ranks.RECIPES)])
def test_two_processes_have_the_masks_and_the_loss_of_one(learned: list[dict[str, Any]], way: str, recipe: str) -> None:
    alone = ranks.learn(lambda model: model, recipe)
    for rank in learned:
        together = rank[way]
        assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert_equal(together["masks"], alone["masks"])
        assert together["flips"] == alone["flips"]
        assert together["layers"] == alone["layers"]
        for stage in ("trained", "weights"):
            assert together[stage].keys() == alone[stage].keys()
            for name, tensor in together[stage].items():
                torch.testing.assert_close(tensor, alone[stage][name], rtol=1e-4, atol=1e-6)
        for name, mask in together["masks"].items():
            assert bool((together["weights"][f"{name}.weight"] != 0).eq(mask).all()), name
    assert max(alone["flips"]) > 0
    assert [row[3:] for row in alone["layers"][:-1]] == [(0, 0) if recipe != "soft" else (0, None)] * 3


@pytest.mark.slow
def test_ddp_may_wrap_a_model_whose_processes_began_apart(learned: list[dict[str, Any]]) -> None:
    own = [Sparsifier(model := ranks.net(seed), SGD(model.parameters(), lr=0.1), "2:4-T").masks() for seed in (0, 1)]
    for rank in learned:
        assert_equal(rank["other seeds"], own[0])
    assert any(not torch.equal(mask, own[1][name]) for name, mask in own[0].items())


@pytest.mark.slow
def test_processes_that_train_models_of_their_own_are_left_alone(learned: list[dict[str, Any]]) -> None:
    masks = [rank["alone"] for rank in learned]
    assert all(not torch.equal(mask, masks[1][name]) for name, mask in masks[0].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("other seeds alone", "OutOfSyncError: after step 0 ranks [1] have other masks than rank 0 in 3 of 3 layers"),
        ("nudged", "OutOfSyncError: after step 2 ranks [1] have other masks than rank 0 in 1 of 3 layers (4.0)"),
        ("skipped ahead", "OutOfSyncError: the processes are at different optimizer steps, [7, 0]"),
        ("sharded too late", "OptimizerMismatchError: the optimizer does not hold the weights of 0, 2, 4.0"),
        ("cut by columns", "ShardingError: the weight of 2 lies as (Shard(dim=0),)"),
    ],
)
def test_trouble_is_an_error_in_every_process(learned: list[dict[str, Any]], trouble: str, message: str) -> None:
    for rank in learned:
        assert rank[trouble].startswith(message)


def test_flat_parameters_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    wrapper = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # one that wraps something needs a GPU
    nn.Module.__init__(wrapper)
    model.append(wrapper)
    with pytest.raises(ShardingError, match=r"FSDP1.*use FSDP2, torch\.distributed\.fsdp\.fully_shard"):
        Sparsifier(model, SGD(model.parameters(), lr=0.1), "2:4")


def test_a_weight_that_something_else_cut_up_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(0))
    with pytest.raises(ShardingError, match=r"weight of 0 has shape \(0,\) in this process, its layer is 4 x 4"):
        Sparsifier(model, SGD(model.parameters(), lr=0.1), "2:4")


def test_a_process_alone_has_everything() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    mask = weight.detach() > 0
    assert full(weight).data_ptr() == local(weight).data_ptr() == weight.data_ptr()
    assert local_part(mask, weight) is mask
    assert plain_type(nn.Linear(2, 2)) is nn.Linear
    check_in_sync(3, {"layer": mask})


def test_masks_on_several_devices_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second device, and the second process, are made up."""
    sent: list[Tensor] = []

    def gather(everyones: list[Tensor], mine: Tensor, group: object) -> None:
        sent.append(mine)
        everyones[:] = [torch.zeros(3), torch.zeros(3)]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(dist, "all_gather", gather)
    mask = torch.ones(2, 4, dtype=torch.bool)
    check_in_sync(3, {"elsewhere": mask.to("meta"), "here": mask})
    assert [(tensor.device.type, tensor.shape) for tensor in sent] == [("meta", (3,))]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 8), (2, 3, 3, 3)])
def test_a_digest_tells_masks_apart_that_differ_in_one_or_two_entries(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(0)) > 0.5
    variants = [mask]
    for first in range(mask.numel()):
        for second in range(first, mask.numel()):
            variant = mask.clone().view(-1)
            variant[[first, second]] ^= True
            variants.append(variant.view(shape))
    digests = {int(digest(variant)) for variant in variants}
    assert len(digests) == len({variant.numpy().tobytes() for variant in variants}) == len(variants)
    assert int(digest(mask.clone())) in digests


def test_four_times_eight_samples_give_the_masks_of_thirty_two() -> None:
    kept = []
    for parts in (1, 4):
        model = ranks.net()
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsifier = Sparsifier(model, optimizer, "2:4-T", Recipe("mine", refresh_every=3, decay=5e-3))
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            inputs = torch.randn(32, 4, 6, 6, generator=generator)
            optimizer.zero_grad()
            for part in inputs.chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
        assert [refresh.step for refresh in sparsifier.telemetry] == [3, 6, 9, 12]
        assert sum(refresh.flip_rate for refresh in sparsifier.telemetry) > 0
        kept.append(sparsifier.masks())
    assert_equal(*kept)
