"""Where passes stop, against what the models' sources say."""

import pytest
import torch
from torch import Tensor, nn

from tests.training.convert.networks import Backwards, conv_net, images
from tnm_pipeline.training.convert.schedule import schedule


def own(*names: str) -> dict[str, tuple[str, ...]]:
    return {name: (name,) for name in names}


def test_order_is_that_of_execution_and_calls_are_counted() -> None:
    plan = schedule(Backwards().eval(), own("idle", "last", "twice", "first"), torch.ones(3, 8))
    assert list(plan.calls.items()) == [("first", 1), ("twice", 2), ("last", 1)]
    assert plan.norms == set()


def test_modules_of_one_stop_count_together() -> None:
    plan = schedule(Backwards().eval(), {"first": ("first", "last"), "twice": ("twice",)}, torch.ones(3, 8))
    assert list(plan.calls.items()) == [("twice", 2), ("first", 2)]  # by the last of the calls


def test_batch_norms_are_stops_and_what_feeds_them_is_known() -> None:
    plan = schedule(conv_net().eval(), own("0", "3", "5"), images()[0])
    assert list(plan.calls) == ["0", "1", "3", "5"]
    assert plan.norms == {"1"}
    assert plan.normed == {"0"}
    without = schedule(conv_net().eval(), own("0", "3", "5"), images()[0], norms=False)
    assert list(without.calls) == ["0", "3", "5"]
    assert without.norms == without.normed == set()


def test_only_norms_that_keep_statistics_and_run_are_stops() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.LayerNorm(4)).eval()
    model[2].register_module("idle", nn.BatchNorm1d(4))
    plan = schedule(model, own("0"), torch.ones(2, 4))
    assert plan.norms == plan.normed == set()


class Apart(nn.Module):
    """Something stands between its layer and its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.layer(x) + x)
        return result


class ChangedInPlace(Apart):
    """Its batch norm gets the very tensor that the layer gave, with other values."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y += x
        result: Tensor = self.norm(y)
        return result


@pytest.mark.parametrize("build", [Apart, ChangedInPlace])
def test_a_layer_whose_output_is_changed_before_the_norm_is_not_normed(build: type[Apart]) -> None:
    assert schedule(build().eval(), own("layer"), torch.ones(2, 4)).normed == set()


@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_stays_behind(fails: bool) -> None:
    model = Backwards().eval()
    if fails:
        with pytest.raises(RuntimeError):
            schedule(model, own("first"), torch.ones(2, 9))
    else:
        schedule(model, own("first"), torch.ones(2, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
