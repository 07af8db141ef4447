"""Teachers: what they add to a loss, that they stay as they are, and that trainings with one go on bit for bit."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from tests.training.labelled import write_encoder, write_pairs
from tnm_pipeline.training.dropout import without_dropout
from tnm_pipeline.training.layers import SparseLinear, make_sparse
from tnm_pipeline.training.loop import FitConfig, SparseTraining, TrainingStoppedError, fit
from tnm_pipeline.training.pattern import Pattern
from tnm_pipeline.training.recipes import RECIPES
from tnm_pipeline.training.scoring import evaluate
from tnm_pipeline.training.selection import Selection
from tnm_pipeline.training.sources import Splits, digits, load_data, load_model
from tnm_pipeline.training.tasks import Classification
from tnm_pipeline.training.teacher import Teacher, TeacherError

CONFIG = FitConfig(epochs=2, batch_size=32, save_every=3)  # 256 samples: 8 steps an epoch
SPARSE = SparseTraining(Pattern(2, 4, transposable=True), RECIPES["static"], Selection(keep_last=False))


def net(seed: int, *, dropout: float = 0.2) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, 16),
            nn.BatchNorm1d(16) if dropout else nn.Identity(),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(16, 12),
        )


def few(targets: Callable[[Tensor], Tensor] = lambda classes: classes) -> Splits:
    data = digits()
    inputs, classes = data.train[:256]
    return Splits(TensorDataset(inputs, targets(classes)), TensorDataset(*data.test[:100]))


def taught(share: float, data: Splits | None = None, config: FitConfig = CONFIG, **arguments: Any) -> nn.Module:
    student = net(0)
    fit(student, data or few(), config, sparsity=SPARSE, teacher=Teacher(net(1), share), **arguments)
    return student


def assert_same(one: nn.Module, other: nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_of_a_teacher_alone_a_model_learns_what_the_teacher_says_and_no_target() -> None:
    misleading = few(lambda classes: 11 - classes)
    assert_same(taught(1.0), taught(1.0, misleading))
    assert not torch.equal(taught(0.5)[1].weight, taught(0.5, misleading)[1].weight)  # type: ignore[index]


def test_a_student_comes_to_agree_with_its_teacher() -> None:
    teacher = net(3)
    fit(teacher, few(lambda classes: 11 - classes), replace(CONFIG, epochs=20))
    inputs, _ = digits().test[:]
    with torch.no_grad():
        said = teacher(inputs).argmax(1)
    agreement = Splits(few().train, TensorDataset(inputs, said))
    student = net(0)
    before = evaluate(student, agreement.test)
    result = fit(student, agreement, replace(CONFIG, epochs=20), sparsity=SPARSE, teacher=Teacher(teacher))
    assert before < 0.3
    assert result.score > 0.7
    assert result.history.loss[-1][1] < result.history.loss[0][1] / 4


def test_the_loss_is_the_weighted_mean_of_both() -> None:
    """Of the one batch that a training of one step sees; without dropout it is known before."""
    inputs, classes = few().train[:]
    student, teacher = net(0, dropout=0), net(1, dropout=0)
    with torch.no_grad():
        own, other = student(inputs), teacher(inputs)
        task = Classification()
        expected = 0.75 * task.loss(own, classes) + 0.25 * task.distance(own, other)
    config = replace(CONFIG, epochs=1, batch_size=256)
    (_, loss), *_ = fit(student, few(), config, teacher=Teacher(teacher, 0.25)).history.loss
    assert loss == pytest.approx(float(expected), rel=1e-5)


def test_parts_of_a_batch_are_compared_with_the_same_parts_of_the_teachers() -> None:
    results = []
    for accumulate in (1, 4):
        student = net(0, dropout=0)
        fit(student, few(), replace(CONFIG, accumulate=accumulate), teacher=Teacher(net(1, dropout=0), 0.5))
        results.append(student)
    for one, other in zip(*(result.parameters() for result in results), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_a_teacher_stays_as_it_is() -> None:
    """It teaches in eval mode, or dropout and running means of batch norm would make another one of it."""
    teacher = net(1).train()
    teacher[2].eval()
    modes = [module.training for module in teacher.modules()]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    members = set(vars(teacher))
    fit(net(0), few(), replace(CONFIG, precision="bf16"), teacher=Teacher(teacher))
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in teacher.parameters())
    assert set(vars(teacher)) == members
    assert [module.training for module in teacher.modules()] == modes


def test_a_teacher_that_is_sparse_itself_keeps_its_masks() -> None:
    teacher = net(1)
    layer = make_sparse(teacher[1], torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) > 0.5)
    mask = layer.mask.clone()
    fit(net(0), few(), CONFIG, sparsity=SPARSE, teacher=Teacher(teacher))
    assert type(layer) is SparseLinear
    assert torch.equal(layer.mask, mask)


def test_a_teacher_is_asked_once_for_each_part_in_the_precision_of_the_training() -> None:
    class Noting(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # Linear's own name
            outputs = super().forward(input)
            seen.append((outputs.dtype, outputs.requires_grad, len(outputs)))
            return outputs

    seen: list[tuple[torch.dtype, bool, int]] = []
    teacher = nn.Sequential(nn.Flatten(), Noting(64, 12))
    config = replace(CONFIG, epochs=1, accumulate=2, precision="bf16")
    fit(net(0), few(), config, teacher=Teacher(teacher))
    assert seen[0] == (torch.float32, False, 2)  # whether it fits
    assert seen[1:] == 16 * [(torch.bfloat16, False, 16)]


def test_a_student_learns_without_dropout_which_it_has_again_afterwards(tmp_path: Path) -> None:
    dropout = taught(1.0)[4]  # type: ignore[index]
    assert dropout.p == 0.2
    dropped, whole = net(0), net(0)
    whole[4] = nn.Dropout(0)
    for student in (dropped, whole):
        fit(student, few(), CONFIG, teacher=Teacher(net(1), 0.5))
    assert_same(dropped, whole)
    without = load_model(f"hf:{write_encoder(tmp_path / 'bert')}", {}).train()
    tokens = torch.ones(2, 8, dtype=torch.long)
    outputs: list[Any] = [without(input_ids=tokens).last_hidden_state for _ in range(2)]
    assert not torch.equal(*outputs)
    with without_dropout(without):
        outputs = [without(input_ids=tokens).last_hidden_state for _ in range(2)]
    assert torch.equal(*outputs)


def test_dropout_of_attention_is_put_back_after_an_error() -> None:
    model = nn.TransformerEncoderLayer(16, 2, dropout=0.3)
    inputs = torch.randn(3, 1, 16)

    def fail() -> None:
        with without_dropout(model):
            assert torch.equal(model(inputs), model(inputs))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert model.self_attn.dropout == model.dropout.p == 0.3
    assert not torch.equal(model(inputs), model(inputs))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_of_recurrent_layers_is_taken_out_too(kind: Callable[..., nn.RNNBase]) -> None:
    model = kind(4, 8, num_layers=2, dropout=0.3)
    inputs = torch.randn(3, 1, 4)
    with without_dropout(model):
        assert torch.equal(model(inputs)[0], model(inputs)[0])
    assert not torch.equal(model(inputs)[0], model(inputs)[0])


@pytest.mark.parametrize("stop_at", [3, 8, 10])
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    done = [0]

    def on_step(step: int, _: int) -> None:
        done[0] = step

    state = tmp_path / "state.safetensors"
    with pytest.raises(TrainingStoppedError):
        taught(0.5, state_path=state, on_step=on_step, should_stop=lambda: done[0] == stop_at)
    torch.manual_seed(12345)  # another process would have other generators
    assert_same(taught(0.5, state_path=state), taught(0.5))


def test_an_encoder_learns_the_embeddings_of_another(tmp_path: Path) -> None:
    student, teacher, data = encoders(tmp_path)
    config = FitConfig(epochs=6, batch_size=16, optimizer="adamw", lr=2e-3)
    *inputs, _ = data.test[:]

    def distance() -> float:
        with torch.no_grad():
            return float(data.task.distance(*(data.task.represent(each.eval(), inputs) for each in (student, teacher))))

    before = distance()
    result = fit(student, data, config, sparsity=SPARSE, teacher=Teacher(teacher))
    assert distance() < before / 2
    assert sum((row.violations or 0) + (row.violations_transposed or 0) for row in result.layers) == 0


def encoders(folder: Path) -> tuple[nn.Module, nn.Module, Splits]:
    """A student, a teacher, and pairs of which a third is tested."""
    source = f"hf:{folder / 'bert'}"
    if not (folder / "bert").exists():
        write_encoder(folder / "bert")
    data = load_data(
        str(write_pairs(folder / "pairs.tsv")), {"tokenizer": str(folder / "bert"), "test_where": {"task": "2014*"}}
    )
    student, teacher = load_model(source, {}), load_model(source, {})
    for parameter in teacher.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    return student, teacher, data


def test_both_see_the_same_noise_which_is_new_in_each_batch(tmp_path: Path) -> None:
    student, teacher, data = encoders(tmp_path)
    seen: dict[str, list[Tensor]] = {"student": [], "teacher": []}
    for name, model in (("student", student), ("teacher", teacher)):

        def note(module: nn.Module, _: Any, given: dict[str, Tensor], name: str = name) -> None:
            if module.training or name == "teacher":
                seen[name].append(given["input_ids"].clone())

        model.register_forward_pre_hook(note, with_kwargs=True)
    config = FitConfig(epochs=2, batch_size=len(data.train), optimizer="adamw", lr=1e-4)
    fit(student, data, config, teacher=Teacher(teacher, noise=0.5))
    first, second = seen["student"]
    assert all(torch.equal(own, other) for own, other in zip(seen["student"], seen["teacher"][1:], strict=True))
    assert not torch.equal(*(ids.flatten().sort().values for ids in (first, second)))
    ids = {tuple(row) for row in data.train.tensors[0].flatten(0, 1)[:, : first.shape[1]].tolist()}
    assert sum(tuple(row) in ids for row in first.tolist()) < len(first) / 4


def test_a_training_with_noise_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def trained(state: Path | None = None, stop_at: int = 0) -> nn.Module:
        student, teacher, data = encoders(tmp_path)
        done = [0]

        def on_step(step: int, _: int) -> None:
            done[0] = step

        fit(
            student,
            data,
            FitConfig(epochs=2, batch_size=32, optimizer="adamw", lr=1e-3, save_every=2),
            sparsity=SPARSE,
            teacher=Teacher(teacher, noise=0.3),
            state_path=state,
            on_step=on_step,
            should_stop=lambda: done[0] == stop_at,
        )
        return student

    state = tmp_path / "state.safetensors"
    with pytest.raises(TrainingStoppedError):
        trained(state, 3)
    torch.manual_seed(12345)  # another process would have other generators
    assert_same(trained(state), trained())


@pytest.mark.parametrize("share", [0.0, -0.5, 1.01, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(TeacherError, match=f"share is {share:g}: give more than 0 and at most 1"):
        Teacher(net(1), share)


def test_teachers_that_cannot_teach_are_refused_before_any_time_is_spent() -> None:
    student = net(0)

    def refused(teacher: nn.Module) -> str:
        with pytest.raises(TeacherError) as caught:
            fit(student, few(), CONFIG, teacher=Teacher(teacher))
        return str(caught.value)

    assert "shares weights" in refused(student)
    assert "shares weights" in refused(nn.Sequential(student, nn.Linear(12, 12)))
    fewer = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    assert "gives (2, 10) and the model (2, 12) for 2 samples: they must have the same classes" in refused(fewer)
    assert "does not take inputs of shape (2, 1, 8, 8): mat1 and mat2" in refused(nn.Linear(63, 12))
    assert_same(student, net(0))


def test_noise_that_cannot_be_meant_is_refused() -> None:
    for noise in (-0.1, 1.5, float("nan")):
        with pytest.raises(TeacherError, match=f"the noise is {noise:g}: give a share of the words"):
            Teacher(net(1), noise=noise)
    with pytest.raises(TeacherError, match=r"targets would be wrong: give the teacher a share of 1 instead of 0\.5"):
        Teacher(net(1), 0.5, 0.1)
    with pytest.raises(TeacherError, match=r"does not fit the task: Classification knows no noise"):
        fit(net(0), few(), CONFIG, teacher=Teacher(net(1), noise=0.1))
