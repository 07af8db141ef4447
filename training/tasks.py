"""What is learned from a data set: how outputs become a loss, and how a test set becomes a score."""

# B = samples in a batch, S = samples in a set, T = tokens of a sentence, D = features of a token, C = classes

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_TEMPERATURE = 2.0  # of class scores that are compared with a teacher's
_EIGHT = 8  # tokens: lengths of batches are multiples, so that kernels and compilers see few shapes


class TaskError(ValueError):
    """What the model returns is not what the task needs."""


class Task(ABC):
    """A kind of supervised learning. A sample is some input tensors and, last, its target.

    Attributes:
        metric: what `score` is called, in lower case; larger is better.
        at_once: samples that are scored in one forward pass.
    """

    metric: str
    at_once: int

    def predict(self, model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """What the model says about a batch, an entry or a row for each sample.

        Args:
            model: in any mode; called once.
            inputs: a batch of each input tensor.

        Raises:
            TaskError: the model returns something else than it should.
        """
        return self.conclude(self.represent(model, inputs))

    @abstractmethod
    def represent(self, model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """What the model makes of a batch, before it becomes predictions; arguments and errors as for `predict`."""

    def vary(self, inputs: Sequence[Tensor], noise: float) -> list[Tensor]:
        """A batch that differs at random, for a teacher to say what it makes of it.

        Args:
            inputs: a batch of each input tensor, which stay as they are.
            noise: how much differs, in [0, 1].

        Raises:
            TaskError: this task has no such noise.
        """
        raise TaskError(f"{type(self).__name__} knows no noise: only sentences vary, by random words. Set noise to 0")

    def conclude(self, outputs: Tensor) -> Tensor:
        """The predictions that follow from what `represent` gave."""
        return outputs

    @abstractmethod
    def distance(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        """How far a batch is from what a teacher makes of it, mean of the samples, a 0-dim tensor; 0 where it is equal.

        Args:
            outputs: what `represent` gives with the model that learns.
            teacher: what it gives with another model, of the same shape.
        """

    def lengths(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """Lengths of samples that are padded to the longest of their batch, (S,); None where all are alike.

        Args:
            tensors: of a whole set.
        """
        return None

    @abstractmethod
    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of a batch, a 0-dim tensor."""

    @abstractmethod
    def score(self, predictions: Tensor, targets: Tensor) -> float:
        """The metric of a whole set."""

    @abstractmethod
    def check(self, predictions: Tensor, targets: Tensor) -> None:
        """Refuse predictions that do not fit the targets.

        Args:
            predictions: of a few samples.
            targets: of all samples, training and test.

        Raises:
            TaskError: they do not fit.
        """


@dataclass(frozen=True)
class Classification(Task):
    """One input tensor to class scores: cross entropy, top-1 accuracy. Targets are (S,) int64 class indices."""

    metric = "accuracy"
    at_once = 1024

    def represent(self, model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """Class scores (B, C)."""
        outputs: Any = model(*inputs)
        if not isinstance(outputs, Tensor):
            raise TaskError(
                f"the model returns a {type(outputs).__name__}: it must return one tensor, the class scores"
            )
        return outputs

    def distance(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        """Kullback-Leibler divergence of the softened classes, times the squared temperature (Hinton et al. 2015)."""
        own, other = ((scores.float() / _TEMPERATURE).log_softmax(1) for scores in (outputs, teacher))
        divergence: Tensor = F.kl_div(own, other, reduction="batchmean", log_target=True) * _TEMPERATURE**2
        return divergence

    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        return F.cross_entropy(predictions, targets)

    def score(self, predictions: Tensor, targets: Tensor) -> float:
        """Share of the samples whose largest class score is that of their class."""
        return int((predictions.argmax(1) == targets).sum()) / len(targets)

    def check(self, predictions: Tensor, targets: Tensor) -> None:
        """Fewer outputs than classes are refused."""
        classes = 1 + int(targets.max())
        if predictions.dim() != 2 or predictions.shape[1] < classes:
            raise TaskError(
                f"the data has {classes} classes, the model gives {tuple(predictions.shape)} for "
                f"{len(predictions)} inputs: it must give ({len(predictions)}, {classes}) or more classes"
            )


@dataclass(frozen=True)
class Similarity(Task):
    """Two sentences to their similarity: mean squared error, Spearman's rank correlation.

    The embedding of a sentence is the mean over its tokens of the model's last hidden states; the prediction is the
    cosine of two embeddings. Targets are (S,) float scores in [0, 1]. Nothing of this is a layer: the checkpoint holds
    the encoder alone.

    Attributes:
        names: of the model's arguments, one for each input tensor (S, 2, T); `attention_mask` is one of them.
        words: ids that stand for text, of `input_ids`.
    """

    names: tuple[str, ...] = ("input_ids", "attention_mask")
    words: tuple[int, ...] = field(default=(), repr=False)

    metric = "spearman"
    at_once = 64

    def represent(self, model: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
        """Embeddings (B, 2, D); columns that are padding in the whole batch are cut off first."""
        arguments = {name: tensor.flatten(0, 1) for name, tensor in zip(self.names, inputs, strict=True)}
        longest = int(arguments["attention_mask"].sum(1).max())
        longest += -longest % _EIGHT
        arguments = {name: tensor[:, :longest] for name, tensor in arguments.items()}
        hidden = _hidden_states(model(**arguments), arguments["attention_mask"])
        real = arguments["attention_mask"].unsqueeze(2).to(hidden.dtype)
        embeddings: Tensor = ((hidden * real).sum(1) / real.sum(1)).unflatten(0, (-1, 2))
        return embeddings

    def vary(self, inputs: Sequence[Tensor], noise: float) -> list[Tensor]:
        """Each word becomes a random one with the probability `noise` (random replacement, Wei & Zou 2019)."""
        if not self.words or "input_ids" not in self.names:
            raise TaskError("noise needs input_ids and the ids of words (Similarity.words), which load_pairs gives")
        place = self.names.index("input_ids")
        ids = inputs[place]
        words = torch.tensor(self.words, device=ids.device)
        drawn = torch.rand(ids.shape)  # on the CPU, whose generator a resumed training has again
        others = words[torch.randint(len(words), ids.shape).to(ids.device)].to(ids.dtype)
        replaced = (drawn.to(ids.device) < noise) & torch.isin(ids, words)
        return [torch.where(replaced, others, ids) if row == place else each for row, each in enumerate(inputs)]

    def conclude(self, outputs: Tensor) -> Tensor:
        """Cosines (B,)."""
        return F.cosine_similarity(outputs[:, 0], outputs[:, 1])

    def distance(self, outputs: Tensor, teacher: Tensor) -> Tensor:
        """1 - the cosine of both embeddings of a sentence."""
        distances: Tensor = 1 - F.cosine_similarity(outputs.float(), teacher.float(), dim=-1)  # (B, 2)
        return distances.mean()

    def lengths(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tokens of the longer sentence."""
        return tensors[self.names.index("attention_mask")].sum(2).amax(1)

    def loss(self, predictions: Tensor, targets: Tensor) -> Tensor:
        """Mean squared error."""
        return F.mse_loss(predictions, targets.to(predictions.dtype))

    def score(self, predictions: Tensor, targets: Tensor) -> float:
        """Spearman's rank correlation."""
        return spearman(predictions, targets)

    def check(self, predictions: Tensor, targets: Tensor) -> None:
        """Any cosine will do."""


def _hidden_states(outputs: Any, attention_mask: Tensor) -> Tensor:
    """(B, T, D) of a model of transformers, or of one that returns that tensor itself."""
    hidden = getattr(outputs, "last_hidden_state", outputs)
    if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[:2] != attention_mask.shape:
        found = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(outputs).__name__
        raise TaskError(
            f"the model gives {found} for tokens of shape {tuple(attention_mask.shape)}: similarity needs an encoder "
            "that returns its hidden states (sentences, tokens, features), or has them in last_hidden_state"
        )
    return hidden


def spearman(first: Tensor, second: Tensor) -> float:
    """Pearson's correlation of the ranks, equal values sharing their mean rank; 0 where all values of one are equal.

    Args:
        first: (S,), any real dtype.
        second: likewise.

    Raises:
        TaskError: NaN, which has no rank.
    """
    broken = int((first.isnan() | second.isnan()).sum())
    if broken:
        raise TaskError(
            f"{broken} of {len(first)} predictions or targets are NaN: the model overflows or its weights are broken"
        )
    ranks = torch.stack([_ranks(first), _ranks(second)])
    ranks = ranks - ranks.mean(1, keepdim=True)
    norms = ranks.square().sum(1).sqrt()
    return float(ranks[0] @ ranks[1] / norms.prod()) if bool(norms.all()) else 0.0


def _ranks(values: Tensor) -> Tensor:
    _, places, counts = values.unique(return_inverse=True, return_counts=True)
    counts = counts.double()
    ranks: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks[places]
