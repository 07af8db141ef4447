"""Tasks: what a batch is worth and how a set is scored, against definitions written in loops."""

import math
from typing import Any

import pytest
import torch
from scipy import stats  # type: ignore[import-untyped]  # ships without types
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tests.training.labelled import write_encoder
from tnm_pipeline.training.scoring import check_match, evaluate
from tnm_pipeline.training.sources import SourceError, Splits, load_model
from tnm_pipeline.training.tasks import Classification, Similarity, TaskError, spearman


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    return load_model(f"hf:{write_encoder(tmp_path_factory.mktemp('encoder') / 'bert')}", {})


def tokens(lengths: list[tuple[int, int]], width: int) -> tuple[Tensor, Tensor]:
    """Random ids and their mask, (S, 2, width)."""
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(2)
    ids = torch.randint(5, 200, mask.shape, generator=torch.Generator().manual_seed(0))
    return ids * mask, mask.long()


@pytest.mark.parametrize("seed", range(5))
def test_spearman_is_that_of_scipy(seed: int) -> None:
    first, second = numbers(50, seed=seed), numbers(50, seed=seed + 100)
    for one, other in ((first, second), (first.round(), second.round()), (first, first + 0.3 * second.round())):
        expected: Any = stats.spearmanr(one.numpy(), other.numpy())
        assert spearman(one, other) == pytest.approx(expected.statistic, abs=1e-12)


def test_spearman_of_orders_that_are_known() -> None:
    rising = torch.tensor([0.1, 0.2, 5.0, 100.0])
    assert spearman(rising, rising.exp()) == pytest.approx(1)
    assert spearman(rising, -rising) == pytest.approx(-1)
    assert spearman(rising, torch.ones(4)) == 0  # scipy: not a number


def test_similarity_is_the_cosine_of_mean_embeddings(encoder: nn.Module) -> None:
    lengths = [(3, 9), (5, 5), (12, 4)]
    ids, mask = tokens(lengths, 20)
    with torch.no_grad():
        found = Similarity().predict(encoder, (ids, mask))
        for pair, own in enumerate(lengths):
            embeddings = []
            for side, length in enumerate(own):  # each sentence alone, without padding
                outputs: Any = encoder(input_ids=ids[pair, side, :length].unsqueeze(0))
                embeddings.append(sum(outputs.last_hidden_state[0][position] for position in range(length)) / length)
            first, second = embeddings
            expected = float(first @ second / first.norm() / second.norm())
            assert float(found[pair]) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("longest", "width"), [(3, 8), (8, 8), (9, 16), (19, 20)])
def test_columns_of_padding_never_reach_the_model(longest: int, width: int) -> None:
    seen = []

    def encoder(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        seen.append((input_ids.shape, attention_mask.shape))
        return F.one_hot(input_ids, 200).float()

    Similarity().predict(encoder, tokens([(longest, 2), (1, 1)], 20))  # type: ignore[arg-type]  # any callable will do
    assert seen == [((4, width), (4, width))]


def test_the_loss_of_similarity_is_the_mean_squared_error() -> None:
    predictions, targets = numbers(7), numbers(7, seed=1).double()
    expected = sum((float(p) - float(t)) ** 2 for p, t in zip(predictions, targets, strict=True)) / 7
    assert float(Similarity().loss(predictions, targets)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        ("text", "the model gives str for tokens of shape"),
        (torch.zeros(4, 7), r"the model gives \(4, 7\) for tokens of shape \(4, 8\)"),
        (torch.zeros(4, 5, 7), r"the model gives \(4, 5, 7\)"),
    ],
)
def test_what_is_no_encoder_is_refused(outputs: Any, said: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return outputs

    with pytest.raises(TaskError, match=said):
        Similarity().predict(Model(), tokens([(3, 3), (5, 2)], 20))
    data = TensorDataset(*tokens([(3, 3), (5, 2)], 20), torch.tensor([0.0, 1.0]))
    with pytest.raises(SourceError, match=said):
        check_match(Model(), Splits(data, data, Similarity()))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_size", [None, 1, 4])
def test_pairs_are_scored_in_any_batches_and_the_mode_is_put_back(
    encoder: nn.Module, training: bool, batch_size: int | None
) -> None:
    ids, mask = tokens([(3 + index, 12 - index) for index in range(9)], 20)
    targets = torch.linspace(0, 1, 9)
    encoder.train(training)
    score = evaluate(encoder, TensorDataset(ids, mask, targets), batch_size, task=Similarity())
    assert encoder.training is training
    with torch.no_grad():
        predictions = Similarity().predict(encoder.eval(), (ids, mask))
    assert math.isclose(score, spearman(predictions, targets))


def test_classes_need_an_output_each() -> None:
    Classification().check(torch.zeros(2, 3), torch.tensor([0, 2]))
    with pytest.raises(TaskError, match=r"the data has 4 classes, the model gives \(2, 3\)"):
        Classification().check(torch.zeros(2, 3), torch.tensor([0, 3]))


def test_what_is_not_a_number_has_no_rank() -> None:
    with pytest.raises(TaskError, match="1 of 3 predictions or targets are NaN"):
        spearman(torch.tensor([float("nan"), 1.0, 2.0]), torch.tensor([1.0, 2.0, 3.0]))


def test_the_distance_of_class_scores_is_the_divergence_of_softened_classes() -> None:
    scores, teacher = numbers(5, 7), 3 * numbers(5, 7, seed=1)
    expected = 0.0
    for own, other in zip(scores.tolist(), teacher.tolist(), strict=True):
        softened = [[math.exp(score / 2) for score in row] for row in (own, other)]
        p, q = ([value / sum(row) for value in row] for row in softened)
        expected += 4 * sum(there * math.log(there / here) for here, there in zip(p, q, strict=True)) / 5
    assert float(Classification().distance(scores, teacher)) == pytest.approx(expected, rel=1e-5)
    assert float(Classification().distance(teacher, teacher)) == pytest.approx(0, abs=1e-6)


def test_the_distance_of_embeddings_is_that_of_both_sentences() -> None:
    own, other = numbers(3, 2, 5), numbers(3, 2, 5, seed=1)
    cosines = [
        float(own[pair, side] @ other[pair, side] / own[pair, side].norm() / other[pair, side].norm())
        for pair in range(3)
        for side in range(2)
    ]
    assert float(Similarity().distance(own, other)) == pytest.approx(1 - sum(cosines) / 6, rel=1e-5)
    assert float(Similarity().distance(own, 3 * own)) == pytest.approx(0, abs=1e-6)


def test_noise_replaces_words_by_others_and_nothing_else() -> None:
    ids, mask = tokens([(40, 30)] * 50, 60)
    ids[:, :, 0] = 2  # a special token
    task = Similarity(words=tuple(range(5, 205)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        (varied, same), (again, _) = task.vary((ids, mask), 0.3), task.vary((ids, mask), 0.3)
        (whole, _) = task.vary((ids, mask), 1.0)
    assert same is mask
    is_word = (ids >= 5) & (mask == 1)
    assert torch.equal(varied[~is_word], ids[~is_word])
    assert float((varied != ids)[is_word].float().mean()) == pytest.approx(0.3, abs=0.02)
    assert not torch.equal(varied, again)
    assert set(whole[is_word].tolist()) == set(range(5, 205))
    assert varied.dtype == ids.dtype
    assert torch.equal(task.vary((ids, mask), 0.0)[0], ids)


def test_tasks_without_noise_say_so() -> None:
    ids, mask = tokens([(3, 3)], 8)
    with pytest.raises(TaskError, match=r"Classification knows no noise: only sentences vary"):
        Classification().vary((ids,), 0.1)
    for task in (Similarity(), Similarity(("tokens", "attention_mask"), (5, 6))):
        with pytest.raises(TaskError, match=r"noise needs input_ids and the ids of words"):
            task.vary((ids, mask), 0.1)
