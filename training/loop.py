"""fit(): the training loop, on Hugging Face Accelerate. Dense and sparse go the same way."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler, TensorDataset

from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import Recipe
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sources import SourceError, Splits
from tnm_pipeline.training.sparsify import LayerReport, Sparsifier
from tnm_pipeline.training.state import load_state, save_state


class TrainingDivergedError(ArithmeticError):
    """The loss or its gradient became NaN or infinite."""


class TrainingStoppedError(RuntimeError):
    """The caller asked to stop; the state file lets the same call go on from here."""


@dataclass(frozen=True)
class FitConfig:
    """How to train.

    Attributes:
        epochs: passes over the training set, each without the samples that do not fill a last batch.
        batch_size: samples in a step, over all processes.
        lr: peak learning rate of dense training; a recipe scales it.
        momentum: of SGD (Nesterov).
        weight_decay: L2, on weights with two or more dimensions.
        warmup: fraction of the steps in which the rate rises linearly; then it falls as a cosine to zero.
        clip_norm: largest gradient norm.
        seed: of initial weights and sample order.
        save_every: optimizer steps between state files.
    """

    epochs: int = 40
    batch_size: int = 64
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    clip_norm: float = 1.0
    seed: int = 0
    save_every: int = 200


@dataclass(frozen=True)
class SparseTraining:
    """How a training becomes sparse: the arguments of a `Sparsifier`."""

    pattern: Pattern
    recipe: Recipe
    selection: Selection = field(default_factory=Selection)


@dataclass
class History:
    """Curves of one training, JSON-able.

    Attributes:
        loss: (optimizer step, mean training loss of the epoch).
        accuracy: (optimizer step, test accuracy in [0, 1]) after every epoch.
        flip_rate: (optimizer step, fraction of mask entries that changed).
    """

    loss: list[tuple[int, float]] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)
    flip_rate: list[tuple[int, float]] = field(default_factory=list)


@dataclass(frozen=True)
class FitResult:
    """What a training leaves; the model itself was trained in place and is plain.

    Attributes:
        accuracy: on the test set, zeros written.
        history: curves.
        layers: a row per prunable layer; empty when dense.
        masks: layer name -> bool mask; empty when dense.
    """

    accuracy: float
    history: History
    layers: list[LayerReport]
    masks: dict[str, Tensor]


def fit(
    model: nn.Module,
    data: Splits,
    config: FitConfig,
    *,
    sparsity: SparseTraining | None = None,
    state_path: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Train a classifier with SGD, densely or with masks; resume bit for bit when a state file is there.

    Args:
        model: trained in place from the weights that it has.
        data: training and test set.
        config: how.
        sparsity: what makes it sparse; None trains densely.
        state_path: state file, written every `save_every` steps and on stopping, read if it exists. The caller
            removes it once the result is safe.
        on_step: told (steps done, steps in all) after each step.
        should_stop: asked after each step.

    Returns:
        The result; the model ends in eval mode.

    Raises:
        SourceError: the model cannot take the data, or has fewer outputs than there are classes.
        TrainingDivergedError: NaN or infinite loss or gradient; the last good state stays on disk.
        TrainingStoppedError: `should_stop` said so; the state is on disk.
    """
    check_match(model, data)
    training = _Training(model, data, config, sparsity)
    if state_path and state_path.exists():
        training.restore(state_path)
    for inputs, targets in training.batches():
        training.step(inputs, targets)
        if on_step:
            on_step(training.done, training.steps)
        stopping = should_stop is not None and should_stop()
        if state_path and (stopping or training.done % config.save_every == 0):
            training.save(state_path)
        if stopping:
            raise TrainingStoppedError(
                f"stopped after step {training.done} of {training.steps}; the same command goes on from there"
            )
    return training.finish()


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset, batch_size: int = 1024) -> float:
    """Top-1 accuracy in [0, 1] in eval mode; the mode is put back afterwards.

    Args:
        model: (B, ...) -> (B, classes).
        data: (inputs, targets).
        batch_size: samples per forward pass.
    """
    training = model.training
    model.eval()
    device = next(model.parameters()).device
    correct = 0
    for start in range(0, len(data), batch_size):
        inputs, targets = data[start : start + batch_size]
        correct += int((model(inputs.to(device)).argmax(1) == targets.to(device)).sum())
    model.train(training)
    return correct / len(data)


class _Training:
    """A training under way: everything that `fit` needs to step, save, restore and finish."""

    def __init__(self, model: nn.Module, data: Splits, config: FitConfig, sparsity: SparseTraining | None) -> None:
        set_seed(config.seed)
        self.model, self.data, self.config = model, data, config
        # Every process takes its share of each batch, so that batch_size means the same for any number of them.
        self.accelerator = Accelerator(dataloader_config=DataLoaderConfiguration(split_batches=True))
        self.shuffle = _Shuffle(len(data.train), config.seed)
        # Its own generator, because each start of an iteration draws from it: a resumed run starts one more.
        loader = DataLoader(
            data.train,
            config.batch_size,
            sampler=self.shuffle,
            generator=torch.Generator(),
            # A ragged last batch would give batch norm a few samples to average over; the next epoch shuffles anew.
            drop_last=len(data.train) >= config.batch_size,
        )
        self.epoch_steps = len(loader)
        self.steps = self.epoch_steps * config.epochs
        self.lr = config.lr * (sparsity.recipe.lr_scale if sparsity else 1.0)
        self.optimizer = _sgd(model, config, self.lr)
        self.sparsifier = None
        if sparsity:
            pattern, recipe, selection = sparsity.pattern, sparsity.recipe, sparsity.selection
            self.sparsifier = Sparsifier(
                model, self.optimizer, pattern, recipe, selection=selection, total_steps=self.steps
            )
        self.schedule = LambdaLR(self.optimizer, lambda step: _warmup_cosine(step, self.steps, config.warmup))
        self.wrapped, self.stepper, self.loader = self.accelerator.prepare(model, self.optimizer, loader)
        self.history = History()
        self.done = 0
        self.loss_sum = 0.0

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All batches that are left, in the order that the seed and the epoch give."""
        while self.done < self.steps:
            self.shuffle.epoch, behind = divmod(self.done, self.epoch_steps)
            left = skip_first_batches(self.loader, behind) if behind else self.loader
            yield from cast(Iterable[tuple[Tensor, Tensor]], left)

    def step(self, inputs: Tensor, targets: Tensor) -> None:
        """One optimizer step; at the end of an epoch the curves grow."""
        self.wrapped.train()
        loss = nn.functional.cross_entropy(self.wrapped(inputs), targets)
        self.stepper.zero_grad()
        self.accelerator.backward(loss)
        norm = cast(Tensor, self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm))
        # The gradient may overflow where the loss does not; a loss scaler skips such steps by itself.
        if not torch.isfinite(loss) or (self.accelerator.scaler is None and not torch.isfinite(norm)):
            raise TrainingDivergedError(
                f"the loss became {loss.item()}, the gradient norm {norm.item()}, at step {self.done + 1} of "
                f"{self.steps}: lower train.lr (now {self.lr:g}) or raise train.warmup; the last good state was kept"
            )
        self.stepper.step()
        self.schedule.step()
        self.done += 1
        self.loss_sum += float(loss.detach())
        if self.done % self.epoch_steps == 0:
            shares = torch.tensor(self.loss_sum / self.epoch_steps, device=self.accelerator.device)
            self.history.loss.append((self.done, float(cast(Tensor, self.accelerator.reduce(shares, "mean")))))
            self.history.accuracy.append((self.done, evaluate(self.model, self.data.test)))
            self.loss_sum = 0.0

    def save(self, path: Path) -> None:
        """Write the state file, on the main process alone."""
        if not self.accelerator.is_main_process:
            return
        progress = {
            "step": self.done,
            "loss_sum": self.loss_sum,
            "history": vars(self.history),
            "schedule": self.schedule.state_dict(),
            "sparsifier": self.sparsifier.state_dict() if self.sparsifier else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        save_state(path, self.model, self.optimizer, progress)

    def restore(self, path: Path) -> None:
        """Go back to where `save` was called."""
        progress = load_state(path, self.model, self.optimizer)
        self.done, self.loss_sum = progress["step"], progress["loss_sum"]
        curves = progress["history"].items()
        self.history = History(**{curve: [(step, value) for step, value in points] for curve, points in curves})
        self.schedule.load_state_dict(progress["schedule"])
        if self.sparsifier:
            self.sparsifier.load_state_dict(progress["sparsifier"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(progress["scaler"])

    def finish(self) -> FitResult:
        """Write the zeros and score what is left."""
        layers: list[LayerReport] = []
        masks: dict[str, Tensor] = {}
        if self.sparsifier:
            self.history.flip_rate = [(refresh.step, refresh.flip_rate) for refresh in self.sparsifier.telemetry]
            layers, masks = self.sparsifier.finalize()
        self.model.eval()
        return FitResult(evaluate(self.model, self.data.test), self.history, layers, masks)


class _Shuffle(Sampler[int]):
    """A new order each epoch that depends on the seed and the epoch alone: a resumed run sees the same."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        yield from torch.randperm(self.size, generator=generator).tolist()


def check_match(model: nn.Module, data: Splits) -> None:
    """Refuse data that the model cannot take, before any time is spent.

    Raises:
        SourceError: the model has no parameters, raises, returns no tensor, or has fewer outputs than classes.
    """
    parameter = next(model.parameters(), None)
    if parameter is None:
        raise SourceError("the model has no parameters: there is nothing to train or to make sparse")
    sample = data.train.tensors[0][:2].to(parameter.device)
    training = model.training
    try:
        with torch.no_grad():
            outputs = model.eval()(sample)
    except Exception as error:  # forward() is the user's own code, which may raise anything
        raise SourceError(
            f"the model does not take the data's inputs of shape {tuple(sample.shape)}: {type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(training)
    if not isinstance(outputs, Tensor):
        raise SourceError(f"the model returns a {type(outputs).__name__}: it must return one tensor, the class scores")
    classes = 1 + max(int(split.tensors[1].max()) for split in (data.train, data.test))
    if outputs.dim() != 2 or outputs.shape[1] < classes:
        raise SourceError(
            f"the data has {classes} classes, the model gives {tuple(outputs.shape)} for two inputs: "
            f"it must give (2, {classes}) or more classes"
        )


def _sgd(model: nn.Module, config: FitConfig, lr: float) -> Optimizer:
    """Nesterov SGD; biases and norms, which have one dimension, are not decayed."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0)


def _warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Factor of the peak learning rate at a step: linear up, then a cosine to zero."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))
