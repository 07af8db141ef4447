"""The callback in a real Trainer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from tnm_pipeline.training.callbacks.huggingface import MASKS, SparsifierCallback
from tnm_pipeline.training.checkpoint import CheckpointError
from tnm_pipeline.training.masks import count_violations
from tnm_pipeline.training.pattern import Pattern, PatternError
from tnm_pipeline.training.recipes import Recipe

PATTERN = Pattern.parse("2:4-T")
RECIPE = Recipe("mine", refresh_every=3, decay=5e-3, lr_scale=2.0)


class Classifier(nn.Module):
    """A net with the interface that the Trainer wants."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(inputs))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class Points(Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(96, 8, generator=generator)
        self.labels = self.inputs[:, :3].argmax(1)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": self.inputs[index], "labels": self.labels[index]}


class StopAfter(TrainerCallback):  # type: ignore[misc]  # untyped in transformers
    """As a kill: the Trainer is given no chance to finish."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


class StopEarly(TrainerCallback):  # type: ignore[misc]  # untyped in transformers
    """As EarlyStoppingCallback: training ends in good order, before its time."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == 6


def trainer(folder: Path, *callbacks: TrainerCallback, batch: int = 8, accumulate: int = 1, **more: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=2,
        learning_rate=0.01,
        lr_scheduler_type="linear",
        logging_steps=4,
        save_steps=5,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **{"seed": 0, **more},
    )
    return Trainer(model=Classifier(), args=arguments, train_dataset=Points(), callbacks=list(callbacks))


def test_the_model_ends_plain_with_its_zeros_written_and_saved(tmp_path: Path) -> None:
    callback = SparsifierCallback("2:4-T", RECIPE)
    work = trainer(tmp_path / "run", callback)
    work.train()
    work.save_model(str(tmp_path / "model"))
    assert [(row.name, row.pattern) for row in callback.report] == [
        ("body.0", "2:4-T"),
        ("body.2", "2:4-T"),
        ("head", None),
    ]
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert set(saved) == set(Classifier().state_dict())
    for name in ("body.0", "body.2"):
        assert count_violations(saved[f"{name}.weight"], PATTERN).of(PATTERN) == 0
        assert torch.equal(saved[f"{name}.weight"] != 0, callback.masks[name])
    assert callback.sparsifier is not None
    assert callback.sparsifier.step == 24


def test_the_rate_is_what_the_recipe_asks_for(tmp_path: Path) -> None:
    rates: list[float] = []

    class Watch(TrainerCallback):  # type: ignore[misc]  # untyped in transformers
        def on_step_begin(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    trainer(tmp_path / "scaled", SparsifierCallback("2:4", RECIPE), Watch()).train()
    scaled, rates = rates, []
    trainer(tmp_path / "as set", SparsifierCallback("2:4", RECIPE, scale_lr=False), Watch()).train()
    assert scaled == pytest.approx([2 * rate for rate in rates])
    assert rates[0] == pytest.approx(0.01)
    assert rates[-1] == pytest.approx(0.01 / 24)


@pytest.mark.parametrize(("pattern", "recipe"), [("2:4-T", RECIPE), ("2:4", "s-ste"), ("2:4-T", "gradual")])
def test_a_resumed_training_ends_with_the_same_bits(tmp_path: Path, pattern: str, recipe: Recipe | str) -> None:
    whole = SparsifierCallback(pattern, recipe)
    straight = trainer(tmp_path / "straight", whole)
    straight.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", SparsifierCallback(pattern, recipe), StopAfter(13)).train()
    again = SparsifierCallback(pattern, recipe)
    resumed = trainer(tmp_path / "cut", again)
    resumed.train(resume_from_checkpoint=True)
    assert straight.model is not None
    assert resumed.model is not None
    for name, tensor in straight.model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name]), name
    assert all(torch.equal(mask, again.masks[name]) for name, mask in whole.masks.items())


@pytest.mark.parametrize("recipe", ["gradual", "dense-tail"])
def test_a_training_that_is_stopped_early_ends_plain_and_sparse_with_a_warning(tmp_path: Path, recipe: str) -> None:
    callback = SparsifierCallback("2:4-T", recipe)
    work = trainer(tmp_path / "run", callback, StopEarly())
    with pytest.warns(UserWarning, match="after step 6 of 24"):
        work.train()
    work.save_model(str(tmp_path / "model"))
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert set(saved) == set(Classifier().state_dict())
    for name, mask in callback.masks.items():
        assert count_violations(saved[f"{name}.weight"], PATTERN).of(PATTERN) == 0
        assert torch.equal(saved[f"{name}.weight"] != 0, mask)


def test_accumulated_batches_count_as_one_step(tmp_path: Path) -> None:
    found = []
    for batch, accumulate in ((32, 1), (8, 4)):
        callback = SparsifierCallback("2:4-T", RECIPE)
        trainer(tmp_path / str(batch), callback, batch=batch, accumulate=accumulate, max_steps=6).train()
        assert callback.sparsifier is not None
        assert callback.sparsifier.step == 6
        found.append(callback.masks)
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, SparsifierCallback("2:4-T", RECIPE), StopAfter(7)).train()
    masks = tmp_path / "checkpoint-5" / MASKS
    other = SparsifierCallback("2:4-T", RECIPE)
    masks.rename(masks.with_name("elsewhere"))
    with pytest.raises(CheckpointError, match="written with SparsifierCallback"):
        trainer(tmp_path, other).train(resume_from_checkpoint=True)


def test_mistakes_are_found_before_training() -> None:
    with pytest.raises(PatternError):
        SparsifierCallback("4:2")
    with pytest.raises(ValueError, match="unknown recipe"):
        SparsifierCallback("2:4", "dynamit")


def test_masks_of_other_weights_are_refused_and_the_right_folder_is_found(tmp_path: Path) -> None:
    for folder, step in (("mine", 7), ("other", 8)):
        with pytest.raises(KeyboardInterrupt):
            trainer(tmp_path / folder, SparsifierCallback("2:4-T", RECIPE), StopAfter(step), seed=step).train()
    wanted = str(tmp_path / "other" / "checkpoint-5")
    with pytest.raises(CheckpointError, match="masks of other weights"):
        trainer(tmp_path / "mine", SparsifierCallback("2:4-T", RECIPE)).train(resume_from_checkpoint=wanted)
    callback = SparsifierCallback("2:4-T", RECIPE)
    work = trainer(tmp_path / "mine", callback, resume_from_checkpoint=wanted)
    work.train(resume_from_checkpoint=wanted)
    assert callback.sparsifier is not None
    assert callback.sparsifier.step == 24
