"""How work is shared among threads, and what one process alone is."""

import threading

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from tnm_pipeline.training.convert.group import Group


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 5, 6])
def test_every_piece_belongs_to_one_process(size: int, count: int) -> None:
    pieces = [piece for rank in range(size) for piece in Group(rank, size).mine(count)]
    assert sorted(pieces) == list(range(count))


def test_a_process_alone_keeps_what_it_has() -> None:
    group = Group.here(3)
    assert (group.rank, group.size, group.workers) == (0, 1, 3)
    assert torch.equal(group.add(torch.tensor([1, 2])), torch.tensor([1, 2]))
    assert group.largest(2.5, torch.device("cpu")) == 2.5
    pieces = group.exchange([torch.tensor(1.0), torch.tensor(2.0)], torch.device("cpu"))
    assert [float(piece) for piece in pieces] == [1.0, 2.0]


def test_pieces_travel_on_the_cpu_and_arrive_on_the_device_of_each_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, made up."""
    sent: list[list[Tensor | None]] = []

    def gather(held: list[list[Tensor | None]], mine: list[Tensor | None]) -> None:
        sent.append(mine)
        held[:] = [mine, [None, torch.zeros(3), None]]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with FakeTensorMode():
        own = torch.device("cuda:0")
        pieces = Group(0, 2).exchange([torch.ones(2, device=own), None, torch.ones(1, device=own)], own)
        assert [None if one is None else one.device.type for one in sent[0]] == ["cpu", None, "cpu"]
        assert [(len(one), one.device) for one in pieces] == [(2, own), (3, own), (1, own)]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_results_come_in_the_order_of_the_items(workers: int) -> None:
    assert Group(workers=workers).each(lambda item: item * item, range(20)) == [item * item for item in range(20)]


def test_workers_work_at_the_same_time() -> None:
    barrier = threading.Barrier(3, timeout=30)  # breaks if they wait for each other
    assert len(Group(workers=3).each(lambda _: barrier.wait(), range(3))) == 3


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_worker_raises_is_raised(workers: int) -> None:
    def work(item: int) -> int:
        return 1 // item

    with pytest.raises(ZeroDivisionError):
        Group(workers=workers).each(work, [2, 1, 0, 3])
    assert not [thread for thread in threading.enumerate() if "ThreadPoolExecutor" in thread.name]
