"""A teacher: a trained network whose outputs another one learns to give (knowledge distillation)."""

# B = samples in a batch

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tnm_pipeline.training.modes import evaluating
from tnm_pipeline.training.processes import send_weights
from tnm_pipeline.training.tasks import Task, TaskError

if TYPE_CHECKING:
    from accelerate import Accelerator


class TeacherError(ValueError):
    """A teacher that cannot teach this model, or a share that is none."""


@dataclass(frozen=True)
class Teacher:
    """Whose outputs count in the loss, and how much: (1 - share) * the task's loss + share * the task's distance.

    It costs a forward pass of the teacher, in eval mode and without gradients, for each batch. Class scores are
    compared as Hinton et al. do (2015, arXiv:1503.02531), embeddings of sentences by their cosine.

    Attributes:
        model: trained, sparse or dense; of any structure that takes the same inputs and gives outputs of the same
            shape. `fit` moves it to its device, gives it the first process's weights in all of them, and otherwise
            leaves it as it was.
        share: in (0, 1]; with 1 the targets play no part.
        noise: how much of the inputs both see changed at random, anew in each batch: the share of words in sentences.
            For the teacher alone, since targets belong to the inputs as they are.

    Raises:
        TeacherError: the share is not in (0, 1], the noise is not in [0, 1], or targets would be learned from noise.
    """

    model: nn.Module
    share: float = 1.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise TeacherError(f"the teacher's share is {self.share:g}: give more than 0 and at most 1, or no teacher")
        if not 0 <= self.noise <= 1:
            raise TeacherError(f"the noise is {self.noise:g}: give a share of the words, from 0 to 1")
        if self.noise and self.share < 1:
            raise TeacherError(
                f"noise of {self.noise:g} changes inputs, and targets would be wrong: give the teacher a share of 1 "
                f"instead of {self.share:g}, or no noise"
            )


class Lesson:
    """A teacher at work in one training.

    Args:
        teacher: in eval mode; in all processes it gets the weights that the first one has.
        task: what is learned.
        accelerator: gives device and precision, the same as the model's.
    """

    def __init__(self, teacher: Teacher, task: Task, accelerator: "Accelerator") -> None:
        self.share, self.noise, self.task = teacher.share, teacher.noise, task
        self.model: nn.Module = accelerator.prepare_model(teacher.model, evaluation_mode=True)
        send_weights(self.model)

    def vary(self, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """The batch that both are to see."""
        return self.task.vary(inputs, self.noise) if self.noise else inputs

    def loss(self, outputs: Tensor, inputs: Sequence[Tensor], targets: Tensor) -> Tensor:
        """Mean loss of a batch, a 0-dim tensor.

        Args:
            outputs: what the task represents the batch by with the model that learns, (B, ...).
            inputs: the batch.
            targets: (B,).
        """
        with torch.no_grad():
            example = self.task.represent(self.model, inputs)
        distance = self.task.distance(outputs, example)
        if self.share == 1:
            return distance
        return (1 - self.share) * self.task.loss(self.task.conclude(outputs), targets) + self.share * distance


def check_teacher(teacher: Teacher, model: nn.Module, inputs: Sequence[Tensor], task: Task) -> None:
    """Refuse a teacher before any time is spent.

    Args:
        teacher: in any mode, which is put back, as is the model's.
        model: that learns.
        inputs: a few samples, on the CPU.
        task: what is learned.

    Raises:
        TeacherError: it shares weights with the model, does not take the inputs, or its outputs have another shape.
    """
    if {id(parameter) for parameter in teacher.model.parameters()} & {id(own) for own in model.parameters()}:
        raise TeacherError("the teacher shares weights with the model that learns: give it a copy of its own")
    try:
        if teacher.noise:
            task.vary(inputs, teacher.noise)
        given, wanted = (_outputs(net, inputs, task) for net in (teacher.model, model))
    except TaskError as error:
        raise TeacherError(f"the teacher does not fit the task: {error}") from error
    except Exception as error:  # forward() is the user's own code, which may raise anything
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise TeacherError(f"the teacher does not take inputs of shape {shapes}: {error}") from error
    if given.shape != wanted.shape:
        raise TeacherError(
            f"the teacher gives {tuple(given.shape)} and the model {tuple(wanted.shape)} for {len(inputs[0])} samples: "
            "they must have the same classes, or embeddings of the same size"
        )


def _outputs(model: nn.Module, inputs: Sequence[Tensor], task: Task) -> Tensor:
    device = next(model.parameters()).device
    with torch.no_grad(), evaluating(model):
        return task.represent(model, [tensor.to(device) for tensor in inputs])
