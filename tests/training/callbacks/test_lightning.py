"""The callback in a real Trainer of Lightning."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from tnm_pipeline.training.callbacks.lightning import SparsifierCallback
from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.masks import count_violations
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.selection import Selection

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of few workers, no logger, and of its own imports

PATTERN = Pattern.parse("2:4-T")
RECIPE = Recipe("mine", refresh_every=3, decay=5e-3, lr_scale=2.0)
STEPS = 24


class Classifier(LightningModule):
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.optimizers_wanted = optimizers
        self.rates: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        inputs, labels = batch
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        return nn.functional.cross_entropy(self.head(self.body(inputs)), labels)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        """Nothing: only the loading of a checkpoint is looked at."""

    def configure_optimizers(self) -> Any:
        if self.optimizers_wanted > 1:
            self.automatic_optimization = False
            return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.body, self.head)]
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class StopAfter(Callback):
    """As a kill: the Trainer is given no chance to finish."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


class StopEarly(Callback):
    """As EarlyStopping: training ends in good order, before its time."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        trainer.should_stop = trainer.global_step == 6


def loader(batch: int = 8) -> DataLoader[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(96, 8, generator=generator)
    return DataLoader(TensorDataset(inputs, inputs[:, :3].argmax(1)), batch)


def trainer(folder: Path, *callbacks: Callback, **more: Any) -> Trainer:
    return Trainer(
        max_epochs=2,
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, ModelCheckpoint(folder, every_n_train_steps=12, save_top_k=-1, filename="{step}")],
        **more,
    )


def test_the_module_ends_plain_with_its_zeros_written(tmp_path: Path) -> None:
    callback, module = SparsifierCallback("2:4-T", RECIPE), Classifier()
    trainer(tmp_path, callback).fit(module, loader())
    assert [(row.name, row.pattern) for row in callback.report] == [
        ("body.0", "2:4-T"),
        ("body.2", "2:4-T"),
        ("head", None),
    ]
    assert callback.sparsifier is not None
    assert callback.sparsifier.step == STEPS
    assert list(module.state_dict()) == list(Classifier().state_dict())
    for name in ("body.0", "body.2"):
        weight = module.get_submodule(name).get_parameter("weight")
        assert count_violations(weight, PATTERN).of(PATTERN) == 0
        assert torch.equal(weight != 0, callback.masks[name])
    assert module.rates == pytest.approx([0.02 * (1 - step / STEPS) for step in range(STEPS)])


@pytest.mark.parametrize(("pattern", "recipe"), [("2:4-T", RECIPE), ("2:4", "s-ste"), ("2:4-T", "gradual")])
def test_a_resumed_fit_ends_with_the_same_bits(tmp_path: Path, pattern: str, recipe: Recipe | str) -> None:
    whole, straight = SparsifierCallback(pattern, recipe), Classifier()
    trainer(tmp_path / "straight", whole).fit(straight, loader())
    cut = trainer(tmp_path / "cut", SparsifierCallback(pattern, recipe), StopAfter(13))
    with pytest.raises(RuntimeError, match="killed"):
        cut.fit(Classifier(), loader())
    again, resumed = SparsifierCallback(pattern, recipe), Classifier()
    trainer(tmp_path / "cut", again).fit(resumed, loader(), ckpt_path=tmp_path / "cut" / "step=12.ckpt")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    assert all(torch.equal(mask, again.masks[name]) for name, mask in whole.masks.items())
    assert resumed.rates == straight.rates[12:]


class Counting(Classifier):
    """Starts an iterator of the data, which draws a number, before the training begins."""

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == STEPS
        return super().configure_optimizers()


@pytest.mark.parametrize("kind", [Classifier, Counting])
@pytest.mark.parametrize("step", [12, 18], ids=["end of an epoch", "middle of an epoch"])
def test_a_resumed_fit_draws_the_same_numbers(tmp_path: Path, step: int, kind: type[Classifier]) -> None:
    """Of the sampled gradient and of dropout. All batches are equal: Lightning itself starts an epoch's data anew."""
    inputs, labels = next(iter(loader()))
    equal = DataLoader(TensorDataset(inputs.repeat(12, 1), labels.repeat(12)), 8)
    recipe = replace(RECIPE, sampled_gradient=True)

    def module() -> Classifier:
        made = kind()
        made.body.append(nn.Dropout(0.2))
        return made

    straight, resumed = module(), module()
    torch.manual_seed(5)
    every = ModelCheckpoint(tmp_path, every_n_train_steps=6, save_top_k=-1, filename="at-{step}")
    trainer(tmp_path, SparsifierCallback("2:4-T", recipe), every).fit(straight, equal)
    torch.manual_seed(6)  # another process would have other generators
    again = trainer(tmp_path / "again", SparsifierCallback("2:4-T", recipe))
    again.fit(resumed, equal, ckpt_path=tmp_path / f"at-step={step}.ckpt")
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_checkpoint_that_is_only_tested_leaves_no_trace(tmp_path: Path) -> None:
    trainer(tmp_path, SparsifierCallback("2:4-T", RECIPE)).fit(Classifier(), loader())
    callback, module, drawn = SparsifierCallback("2:4-T", RECIPE), Classifier(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        trainer(tmp_path, callback).test(module, loader(), ckpt_path=tmp_path / "step=12.ckpt")
        drawn.append(float(torch.rand(())))
    assert drawn[0] != drawn[1]
    trainer(tmp_path, callback).fit(module, loader())
    assert callback.sparsifier is not None
    assert callback.sparsifier.step == STEPS


def test_checkpoints_have_the_names_of_the_plain_module(tmp_path: Path) -> None:
    trainer(tmp_path, SparsifierCallback("2:4-T", RECIPE)).fit(Classifier(), loader())
    saved = torch.load(tmp_path / "step=12.ckpt", weights_only=True)
    Classifier().load_state_dict(saved["state_dict"])


@pytest.mark.filterwarnings("always:after step")
@pytest.mark.parametrize("recipe", ["gradual", "dense-tail"])
def test_a_fit_that_is_stopped_early_ends_plain_and_sparse_with_a_warning(tmp_path: Path, recipe: str) -> None:
    callback, module = SparsifierCallback("2:4-T", recipe), Classifier()
    with pytest.warns(UserWarning, match="after step 6 of 24"):
        trainer(tmp_path, callback, StopEarly()).fit(module, loader())
    assert list(module.state_dict()) == list(Classifier().state_dict())
    assert set(callback.masks) == {"body.0", "body.2"}
    for name, mask in callback.masks.items():
        weight = module.get_submodule(name).get_parameter("weight")
        assert count_violations(weight, PATTERN).of(PATTERN) == 0
        assert torch.equal(weight != 0, mask)


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    found = []
    for batch, accumulate in ((32, 1), (8, 4)):
        callback = SparsifierCallback("2:4-T", RECIPE)
        trainer(tmp_path / str(batch), callback, accumulate_grad_batches=accumulate).fit(Classifier(), loader(batch))
        assert callback.sparsifier is not None
        assert callback.sparsifier.step == 6
        found.append(callback.masks)
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def test_masks_of_other_layers_are_refused(tmp_path: Path) -> None:
    trainer(tmp_path, SparsifierCallback("2:4-T", RECIPE)).fit(Classifier(), loader())
    other = SparsifierCallback("2:4-T", RECIPE, selection=Selection(keep_last=False))
    with pytest.raises(CheckpointError, match="of 2 tensors, this training of 3"):
        trainer(tmp_path, other).fit(Classifier(), loader(), ckpt_path=tmp_path / "step=12.ckpt")


def test_several_optimizers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 optimizers"):
        trainer(tmp_path, SparsifierCallback("2:4-T", RECIPE)).fit(Classifier(optimizers=2), loader())


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path).fit(Classifier(), loader())
    with pytest.raises(CheckpointError, match="holds no masks"):
        trainer(tmp_path, SparsifierCallback("2:4", RECIPE)).fit(
            Classifier(), loader(), ckpt_path=tmp_path / "step=12.ckpt"
        )


def test_a_second_fit_starts_anew(tmp_path: Path) -> None:
    callback = SparsifierCallback("2:4", RECIPE)
    trainer(tmp_path / "first", callback).fit(Classifier(), loader())
    trainer(tmp_path / "second", callback).fit(Classifier(), loader(), ckpt_path=tmp_path / "first" / "step=12.ckpt")
    fresh = Classifier()
    trainer(tmp_path / "third", callback).fit(fresh, loader())
    assert callback.sparsifier is not None
    assert callback.sparsifier.step == STEPS
    assert fresh.rates[0] == pytest.approx(0.02)
