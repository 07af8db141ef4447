"""fit(): the training loop, on Hugging Face Accelerate. Dense and sparse go the same way."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import cast

import torch
from accelerate import skip_first_batches
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tnm_pipeline.training.backend import Choice
from tnm_pipeline.training.dropout import without_dropout
from tnm_pipeline.training.event_files import EventFiles
from tnm_pipeline.training.finalize import LayerReport
from tnm_pipeline.training.fitting import FitConfig as FitConfig
from tnm_pipeline.training.fitting import FitResult as FitResult
from tnm_pipeline.training.fitting import History as History
from tnm_pipeline.training.fitting import SparseTraining as SparseTraining
from tnm_pipeline.training.image_folder import ImageSet
from tnm_pipeline.training.lending import keeping_forward, lent
from tnm_pipeline.training.modes import evaluating
from tnm_pipeline.training.optimizers import make_optimizer, warmup_cosine
from tnm_pipeline.training.processes import any_says, each_says, first_says, make_accelerator, rank
from tnm_pipeline.training.scoring import check_match, evaluate, unused_parameters
from tnm_pipeline.training.shuffle import Shuffle
from tnm_pipeline.training.sources import Splits
from tnm_pipeline.training.sparsify import Sparsifier
from tnm_pipeline.training.state import load_state, save_state
from tnm_pipeline.training.teacher import Lesson, Teacher, check_teacher


class TrainingDivergedError(ArithmeticError):
    """The loss or its gradient became NaN or infinite."""


class TrainingStoppedError(RuntimeError):
    """The caller asked to stop; the state file lets the same call go on from here."""


def fit(
    model: nn.Module,
    data: Splits,
    config: FitConfig,
    *,
    sparsity: SparseTraining | None = None,
    teacher: Teacher | None = None,
    state_path: Path | None = None,
    events: Path | None = None,
    on_step: Callable[[int, int], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> FitResult:
    """Train a model, densely or with masks; resume when a state file is there.

    To the bit with the backend `masked` and the same number of processes, each of which draws random numbers of its
    own, as for dropout.

    Args:
        model: trained in place from the weights that it has.
        data: training and test set, and what is learned from them.
        config: how.
        sparsity: what makes it sparse; None trains densely.
        teacher: whose outputs are learned, beside the targets or instead of them; without dropout, whose noise a
            teacher's outputs do not need.
        state_path: state file, written every `save_every` steps and on stopping, read if it exists. The caller
            removes it once the result is safe.
        events: folder for TensorBoard's event files; those of a training that is not resumed are removed from it.
        on_step: told (steps done, steps in all) after each step.
        should_stop: asked after each step.

    Returns:
        The result; the model ends in eval mode.

    Raises:
        SourceError: the model cannot take the data, or what it returns does not fit the task.
        TeacherError: the teacher cannot take the data, or does not fit the model.
        BatchSizeError: a batch cannot be cut into equal parts for the processes and what each computes at a time.
        PrecisionError: fp16 without a GPU.
        CheckpointError: the state file is damaged, or of another model, optimizer, pattern or recipe.
        TrainingDivergedError: NaN or infinite loss or gradient; the last good state stays on disk.
        TrainingStoppedError: `should_stop` said so; the state is on disk. After this and any other error the model is
            plain, with the weights that it had come to.
    """
    check_match(model, data)
    if teacher:
        check_teacher(teacher, model, data.train[:2][:-1], data.task)
    with ExitStack() as loans:
        loans.enter_context(lent(model))
        if teacher:
            loans.enter_context(evaluating(teacher.model))
            loans.enter_context(keeping_forward(teacher.model))
            loans.enter_context(without_dropout(model))
        training = _Training(model, data, config, sparsity, teacher)
        if state_path and first_says(state_path.exists):
            training.restore(state_path)
        folder = events if training.accelerator.is_main_process else None
        with closing(EventFiles(folder, training.done)) as training.events:
            _run(training, state_path, on_step, should_stop)
        layers, masks, packs = training.finish()
    score = evaluate(model.eval(), data.test, task=data.task)
    return FitResult(data.task.metric, score, training.history, layers, masks, packs)


def _run(
    training: "_Training",
    state_path: Path | None,
    on_step: Callable[[int, int], None] | None,
    should_stop: Callable[[], bool] | None,
) -> None:
    for batch in training.batches():
        training.step(batch)
        if on_step:
            on_step(training.done, training.steps)
        stopping = should_stop is not None and any_says(should_stop(), training.accelerator.device)
        if state_path and (stopping or training.done % training.config.save_every == 0):
            training.save(state_path)
        if stopping:
            raise TrainingStoppedError(
                f"stopped after step {training.done} of {training.steps}; the same command goes on from there"
            )


class _Training:
    """A training under way: everything that `fit` needs to step, save, restore and finish."""

    def __init__(
        self,
        model: nn.Module,
        data: Splits,
        config: FitConfig,
        sparsity: SparseTraining | None,
        teacher: Teacher | None,
    ) -> None:
        self.model, self.data, self.config = model, data, config
        batch_size = min(config.batch_size, len(data.train))
        self.accelerator = make_accelerator(batch_size, config.accumulate, config.precision)
        # Equal generators would drop out the same places of every process's share. (numpy takes no larger seeds.)
        set_seed((config.seed + rank()) % 2**32)
        lengths = data.task.lengths(data.train.tensors)
        self.shuffle = Shuffle(len(data.train), config.seed, batch_size, lengths)
        # Its own generator, because each start of an iteration draws from it: a resumed run starts one more.
        loader = DataLoader(
            data.train,
            batch_size,
            sampler=self.shuffle,
            generator=torch.Generator(),
            # A ragged last batch would give batch norm a few samples to average over; the next epoch shuffles anew.
            drop_last=True,
        )
        self.epoch_steps = len(loader)
        self.steps = self.epoch_steps * config.epochs
        self.lr = config.lr * (sparsity.recipe.lr_scale if sparsity else 1.0)
        self.optimizer = make_optimizer(
            config.optimizer, model, lr=self.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.schedule = LambdaLR(self.optimizer, lambda step: warmup_cosine(step, self.steps, config.warmup))
        # DDP would wait for their gradients forever.
        for parameter in unused_parameters(model, data) if self.accelerator.num_processes > 1 else ():
            parameter.requires_grad_(False)
        self.wrapped, self.stepper, self.loader = self.accelerator.prepare(model, self.optimizer, loader)
        self.lesson = Lesson(teacher, data.task, self.accelerator) if teacher else None
        self.sparsifier, self.backend = None, sparsity.backend if sparsity else "masked"
        if sparsity:  # after DDP has sent the weights of rank 0 around: it would send masks in every forward pass
            self.sparsifier = Sparsifier(
                model,
                self.optimizer,
                sparsity.pattern,
                sparsity.recipe,
                selection=sparsity.selection,
                total_steps=self.steps,
                backend=sparsity.backend,
                micro_batches=config.accumulate,
            )
        self.history = History()
        self.done = 0
        self.loss_sum = 0.0
        self.events = EventFiles(None, 0)

    def batches(self) -> Iterator[Sequence[Tensor]]:
        """All batches that are left, in the order that the seed and the epoch give."""
        while self.done < self.steps:
            self.shuffle.epoch, behind = divmod(self.done, self.epoch_steps)
            if isinstance(self.data.train, ImageSet):
                self.data.train.draw(self.config.seed, self.shuffle.epoch)
            left = skip_first_batches(self.loader, behind) if behind else self.loader
            yield from cast(Iterable[Sequence[Tensor]], left)

    def step(self, batch: Sequence[Tensor]) -> None:
        """One optimizer step; at the end of an epoch the curves grow."""
        self.wrapped.train()
        self.stepper.zero_grad()
        loss = self.backward(batch)
        norm = cast(Tensor, self.accelerator.clip_grad_norm_(self.wrapped.parameters(), self.config.clip_norm))
        # The gradient may overflow where the loss does not; a loss scaler skips such steps by itself.
        if not torch.isfinite(loss) or (self.accelerator.scaler is None and not torch.isfinite(norm)):
            raise TrainingDivergedError(
                f"the loss became {loss.item()}, the gradient norm {norm.item()}, at step {self.done + 1} of "
                f"{self.steps}: lower train.lr (now {self.lr:g}) or raise train.warmup; the last good state was kept"
            )
        rate = float(self.schedule.get_last_lr()[0])
        updates = len(self.sparsifier.telemetry) if self.sparsifier else 0
        self.stepper.step()
        self.schedule.step()
        self.done += 1
        self.loss_sum += float(loss)
        if self.done % self.epoch_steps == 0:
            shares = torch.tensor(self.loss_sum / self.epoch_steps, device=self.accelerator.device)
            self.history.loss.append((self.done, float(cast(Tensor, self.accelerator.reduce(shares, "mean")))))
            self.history.score.append((self.done, evaluate(self.model, self.data.test, task=self.data.task)))
            self.loss_sum = 0.0
            (_, trained), (_, tested) = self.history.loss[-1], self.history.score[-1]
            names = ("training loss", f"test {self.data.task.metric}", "learning rate")
            self.events.add_epoch(self.done, dict(zip(names, (trained, tested, rate), strict=True)))
        # Counted, as the Sparsifier's steps lag behind where a loss scaler skips some.
        for refresh in self.sparsifier.telemetry[updates:] if self.sparsifier else ():
            self.events.add_refresh(refresh)

    def backward(self, batch: Sequence[Tensor]) -> Tensor:
        """Add the gradients of a batch, part by part; returns its mean loss."""
        losses = []
        parts = list(zip(*(tensor.chunk(self.config.accumulate) for tensor in batch), strict=True))
        for number, (*inputs, targets) in enumerate(parts, start=1):
            # Processes exchange gradients once, with the last part.
            last = number == len(parts)
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                loss = self.loss(inputs, targets) / len(parts)
                self.accelerator.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def loss(self, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Mean loss of a part of a batch."""
        task = self.data.task
        inputs = self.lesson.vary(inputs) if self.lesson else inputs
        outputs = task.represent(self.wrapped, inputs)
        return self.lesson.loss(outputs, inputs, targets) if self.lesson else task.loss(task.conclude(outputs), targets)

    def save(self, path: Path) -> None:
        """Write the state file."""
        progress = {
            "step": self.done,
            "loss_sums": each_says(self.loss_sum),
            "history": vars(self.history),
            "schedule": self.schedule.state_dict(),
            "sparsifier": self.sparsifier.state_dict() if self.sparsifier else None,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        save_state(path, self.model, self.optimizer, progress, self.sparsifier)

    def restore(self, path: Path) -> None:
        """Go back to where `save` was called."""
        progress = load_state(path, self.model, self.optimizer, self.sparsifier)
        self.done, sums = progress["step"], progress["loss_sums"]
        same = len(sums) == self.accelerator.num_processes
        self.loss_sum = sums[self.accelerator.process_index] if same else sum(sums) / len(sums)
        curves = progress["history"].items()
        self.history = History(**{curve: [(step, value) for step, value in points] for curve, points in curves})
        self.schedule.load_state_dict(progress["schedule"])
        if self.sparsifier:
            self.sparsifier.load_state_dict(progress["sparsifier"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(progress["scaler"])

    def finish(self) -> tuple[list[LayerReport], dict[str, Tensor], list[Choice]]:
        """Write the zeros; what `FitResult` says of layers, masks and packs."""
        if self.sparsifier is None:
            return [], {}, []
        self.history.flip_rate = [(refresh.step, refresh.flip_rate) for refresh in self.sparsifier.telemetry]
        packs = [] if self.backend == "masked" else self.sparsifier.packs.table()
        # Not strict: a loss scaler that skipped steps may leave the end of a ramp out, and there is no way back.
        return *self.sparsifier.finalize(strict=False), packs
