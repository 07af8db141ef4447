"""The precision that fit() trains in: what is asked for, whatever the environment and earlier trainings say."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tnm_pipeline.training.loop import FitConfig, SparseTraining, fit
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.processes import Precision, PrecisionError, make_accelerator
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.sources import Splits, digits

CONFIG = FitConfig(epochs=1, batch_size=32)


class Noting(nn.Sequential):
    """Notes the type of what its first layer gives while it trains."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
        self.seen: set[torch.dtype] = set()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # Sequential's own name
        hidden: Tensor = self[1](self[0](input))
        if self.training:
            self.seen.add(hidden.dtype)
        outputs: Tensor = self[3](self[2](hidden))
        return outputs


def few() -> Splits:
    data = digits()
    return Splits(TensorDataset(*data.train[:64]), TensorDataset(*data.test[:50]))


def seen(precision: Precision) -> set[torch.dtype]:
    model = Noting()
    fit(model, few(), replace(CONFIG, precision=precision))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    return model.seen


def test_each_training_has_its_own() -> None:
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("bf16", torch.bfloat16)):
        assert seen(precision) == {dtype}  # type: ignore[arg-type]  # not seen to be literals


def test_it_holds_against_the_environment_which_a_warning_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert seen("bf16") == {torch.bfloat16}
    with pytest.warns(UserWarning, match="ACCELERATE_MIXED_PRECISION is bf16, and precision is fp32"):
        assert seen("fp32") == {torch.float32}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="the refusal is for machines without a GPU")
def test_fp16_needs_a_gpu() -> None:
    with pytest.raises(PrecisionError, match=r"fp16 needs a GPU, .* take the precision bf16 or fp32"):
        make_accelerator(32, precision="fp16")


@pytest.mark.gpu
def test_fp16_trains_with_a_loss_scaler() -> None:
    assert make_accelerator(32, precision="fp16").scaler is not None
    assert seen("fp16") == {torch.float16}


def test_the_result_says_how_layers_multiplied_where_packed_products_were_tried() -> None:
    sparsity = SparseTraining(Pattern(2, 4), Recipe("static"))
    assert fit(Noting(), few(), CONFIG, sparsity=sparsity).packs == []
    (row,) = fit(Noting(), few(), CONFIG, sparsity=replace(sparsity, backend="auto")).packs
    assert (row.layer, row.shape) == ("1", (16, 64))
    assert row.why
    if not torch.cuda.is_available():
        assert (row.chosen, row.why) == ("masked", "no CUDA device")
