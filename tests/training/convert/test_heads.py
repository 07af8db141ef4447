"""Which attention heads have a free basis, and that the network stays the same in another one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.zoo import SMALL, minilm, minilm_inputs
from tnm_pipeline.training.convert.batch import Batch, forward
from tnm_pipeline.training.convert.heads import HeadSpace, find_head_spaces
from tnm_pipeline.training.convert.rotation import Rotation
from tnm_pipeline.training.convert.tracing import trace

Parts = list[tuple[str, int, list[list[int]]]]
HEADS, SIZE = 2, 3  # of `Attention`
BY_HEAD = [[0, 1, 2], [3, 4, 5]]


@torch.no_grad()
def outputs(model: nn.Module, batch: Batch) -> Tensor:
    result = forward(model.eval(), batch)
    result = result[0] if isinstance(result, tuple) else getattr(result, "last_hidden_state", result)
    assert isinstance(result, Tensor)
    return result


def random_rotation(space: HeadSpace, seed: int = 0) -> Rotation:
    heads, size = space.parts[0].index.shape
    noise = torch.randn(heads, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return Rotation(space, torch.linalg.qr(noise)[0], 0.0, 1.0)


def check_rotations(model: nn.Module, traced: Batch, other: Batch) -> list[Parts]:
    """Rotate all heads at random, one space after the other; returns the parts of each."""
    spaces = find_head_spaces(trace(model, traced), model)
    expected = outputs(model, other)
    for space in spaces:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        random_rotation(space).apply(model)
        for part in space.parts:
            weight = f"{part.layer}.weight"
            assert not torch.allclose(model.state_dict()[weight], before[weight], atol=1e-3)
    torch.testing.assert_close(outputs(model, other), expected, atol=1e-5, rtol=1e-5)
    return sorted([(part.layer, part.axis, part.index.tolist()) for part in space.parts] for space in spaces)


def rows(count: int, size: int, first: int = 0) -> list[list[int]]:
    return [[first + head * size + channel for channel in range(size)] for head in range(count)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_bert_has_two_spaces_a_block(attention: str) -> None:
    build, inputs = SMALL["bert"]
    model = build()
    model.set_attn_implementation(attention)  # type: ignore[operator]  # of transformers
    heads = rows(2, 16)
    expected = []
    for block in range(2):
        own = f"encoder.layer.{block}.attention."
        expected.append([(f"{own}self.query", 0, heads), (f"{own}self.key", 0, heads)])
        expected.append([(f"{own}self.value", 0, heads), (f"{own}output.dense", 1, heads)])
    assert check_rotations(model, inputs(2, 0), inputs(5, 1)) == sorted(expected)


def test_minilm_has_two_spaces_a_block() -> None:
    found = check_rotations(minilm()[0], minilm_inputs(2, 0), minilm_inputs(4, 1))
    assert len(found) == 12
    assert all(index == rows(12, 32) for parts in found for _, _, index in parts)


def test_a_vision_transformer_has_them_in_one_layer() -> None:
    build, inputs = SMALL["vit"]
    expected = []
    for block in range(2):
        qkv, projection = f"layers.{block}.attention.qkv", f"layers.{block}.attention.projection"
        expected.append([(qkv, 0, rows(2, 16)), (qkv, 0, rows(2, 16, 32))])
        expected.append([(qkv, 0, rows(2, 16, 64)), (projection, 1, rows(2, 16))])
    assert check_rotations(build(), inputs(2, 0), inputs(5, 1)) == expected


class Attention(nn.Module):
    """Two heads of three channels; `attend` makes of queries, keys and values, (B, T, 6) each, what is projected."""

    def __init__(self, attend: Callable[["Attention", Tensor, Tensor, Tensor], object]) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.query, self.key, self.value = (nn.Linear(8, 6) for _ in range(3))
            self.output = nn.Linear(6, 8)
            self.other = nn.Linear(6, 8, bias=False)
            self.scale = nn.Parameter(torch.rand(1))
            self.scales = nn.Parameter(torch.rand(SIZE))
        self.attend = attend

    def forward(self, x: Tensor) -> object:
        y = self.attend(self, self.query(x), self.key(x), self.value(x))
        return self.output(y) if isinstance(y, Tensor) else y


def split(x: Tensor) -> Tensor:
    return x.view(x.shape[0], x.shape[1], HEADS, SIZE).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def fused(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(F.scaled_dot_product_attention(split(q), split(k), value=split(v)))


def shares(q: Tensor, k: Tensor) -> Tensor:
    return torch.softmax((q @ k.transpose(-1, -2)) / SIZE**0.5, -1)


def explicit(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return joined(F.dropout(shares(split(q), split(k)), 0.1, m.training) @ split(v))


def in_batches(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As older code does: heads are part of the batch."""
    q, k, v = (split(x).reshape(-1, x.shape[1], SIZE).contiguous() for x in (q * 0.5, k, v))
    mixed = torch.bmm(torch.bmm(q, k.permute(0, 2, 1)).softmax(-1), v)
    return joined(mixed.view(-1, HEADS, *mixed.shape[1:]))


def interleaved(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Channels of a head are not neighbours."""
    q, k, v = (x.unflatten(-1, (SIZE, HEADS)).movedim(-1, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).permute(0, 2, 3, 1).reshape(q.shape[0], q.shape[2], -1)


def spaces_of(attend: Callable[[Attention, Tensor, Tensor, Tensor], object]) -> list[Parts]:
    model = Attention(attend)
    noise = torch.randn(2, 2, 5, 8, generator=torch.Generator().manual_seed(1))
    return check_rotations(model, noise[0], noise[1])


@pytest.mark.parametrize(
    ("attend", "heads"),
    [(fused, BY_HEAD), (explicit, BY_HEAD), (in_batches, BY_HEAD), (interleaved, [[0, 2, 4], [1, 3, 5]])],
)
def test_heads_are_found_however_attention_is_written(
    attend: Callable[[Attention, Tensor, Tensor, Tensor], object], heads: list[list[int]]
) -> None:
    assert spaces_of(attend) == [[("query", 0, heads), ("key", 0, heads)], [("value", 0, heads), ("output", 1, heads)]]


@pytest.mark.parametrize("change", [lambda m, x: x * m.scale, lambda m, x: 0.5 * x.clone(), lambda m, x: x / 3])
def test_scaling_by_one_number_is_passed(change: Callable[[Attention, Tensor], Tensor]) -> None:
    assert len(spaces_of(lambda m, q, k, v: fused(m, change(m, q), change(m, k), change(m, v)))) == 2


def values_are_free(attend: Callable[[Attention, Tensor, Tensor, Tensor], object]) -> bool:
    return any(parts[0][0] == "value" for parts in spaces_of(attend))


def products_are_free(attend: Callable[[Attention, Tensor, Tensor, Tensor], object]) -> bool:
    return any(parts[0][0] == "query" for parts in spaces_of(attend))


CHANGES: list[Callable[[Attention, Tensor], Tensor]] = [
    lambda m, x: joined(split(x) * m.scales),  # by channel
    lambda m, x: F.gelu(x),
    lambda m, x: F.layer_norm(x, (6,)),
    lambda m, x: x + 1,
    lambda m, x: x.add_(1.0),
    lambda m, x: x.relu_(),
    lambda m, x: x.flip(-1),
    lambda m, x: x.roll(1, dims=-1),
    lambda m, x: torch.cat([x[..., 3:], x[..., :3]], -1),
    lambda m, x: x * x.shape[1] if x.tolist() else x,
    lambda m, x: x * x,
    lambda m, x: 1 / x,
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("attend", [fused, explicit])
def test_all_else_on_the_way_binds_the_basis(
    change: Callable[[Attention, Tensor], Tensor], attend: Callable[[Attention, Tensor, Tensor, Tensor], Tensor]
) -> None:
    assert not values_are_free(lambda m, q, k, v: attend(m, q, k, change(m, v)))
    assert not values_are_free(lambda m, q, k, v: change(m, attend(m, q, k, v)))
    assert not products_are_free(lambda m, q, k, v: attend(m, change(m, q), k, v))
    assert not products_are_free(lambda m, q, k, v: attend(m, q, change(m, k), v))


@pytest.mark.parametrize(
    "attend",
    [
        lambda m, q, k, v: (m.output(fused(m, q, k, v)), v),  # returned
        lambda m, q, k, v: (m.output(fused(m, q, k, v)) + v.mean(),),
        lambda m, q, k, v: (m.output(y := fused(m, q, k, v)) + m.other(y),),  # read twice
        lambda m, q, k, v: (m.output(fused(m, q, k, v)) + m.other(v),),
        lambda m, q, k, v: (m.output(fused(m, q, k, v)) + m.output(fused(m, k, q, v)),),
        lambda m, q, k, v: (m.output(fused(m, q, k, v)) + m.output.weight.sum(),),
        lambda m, q, k, v: (m.output(fused(m, q, k, v)) + m.value.bias.sum(),),
        lambda m, q, k, v: (F.linear(fused(m, q, k, v), m.output.weight),),  # does not run as a module
        lambda m, q, k, v: v,  # heads are unknown
        lambda m, q, k, v: fused(m, q, k, v.transpose(1, 2).reshape(v.shape)),  # channels are mixed
        lambda m, q, k, v: joined(split(v) @ shares(split(q), split(k))[..., :SIZE, :SIZE]),  # a product of channels
        lambda m, q, k, v: joined(shares(split(v), split(v)) @ split(q)),
        lambda m, q, k, v: interleaved(m, q, k, fused(m, q, k, v)),  # mixed twice, by other heads
    ],
)
def test_values_that_are_read_elsewhere_keep_their_basis(
    attend: Callable[[Attention, Tensor, Tensor, Tensor], object],
) -> None:
    assert not values_are_free(attend)


@pytest.mark.parametrize(
    "attend",
    [
        lambda m, q, k, v: (m.output(fused(m, q, k, v)), k),
        lambda m, q, k, v: (m.output(fused(m, q, k, v)) + q.mean(),),
        lambda m, q, k, v: fused(m, q, k, v) + fused(m, q, k, v),  # compared twice
        lambda m, q, k, v: fused(m, q, q, v),
        lambda m, q, k, v: fused(m, q, v, k) + fused(m, q, k, v),
        lambda m, q, k, v: joined(split(q) @ split(k)[..., :SIZE, :]),  # of other axes
        lambda m, q, k, v: fused(m, q, k.view(k.shape[0], -1, 3, 2).transpose(-1, -2).reshape(k.shape).flip(1), v),
        lambda m, q, k, v: (m.output(fused(m, q, k, v)) + m.query.weight.sum(),),
        lambda m, q, k, v: joined(F.scaled_dot_product_attention(split(q), split(k), split(v), split(q) @ split(k).mT)),
    ],
)
def test_queries_that_are_read_elsewhere_keep_their_basis(
    attend: Callable[[Attention, Tensor, Tensor, Tensor], object],
) -> None:
    assert not products_are_free(attend)


def test_keys_that_heads_share_keep_their_basis() -> None:
    def grouped(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        one = k[:, None, :, :SIZE].expand(-1, HEADS, -1, -1)
        return joined(F.scaled_dot_product_attention(split(q), one, split(v)))

    def told(m: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (x.unflatten(-1, (1, 6)).transpose(1, 2)[..., :SIZE] for x in (k, v))
        return joined(F.scaled_dot_product_attention(split(q), keys, values, enable_gqa=True))

    assert not products_are_free(grouped)
    assert values_are_free(grouped)
    assert spaces_of(told) == []


def test_shared_and_half_precision_weights_keep_their_basis() -> None:
    noise = torch.randn(2, 5, 8)
    tied = Attention(fused)
    tied.key.weight = tied.query.weight
    assert len(find_head_spaces(trace(tied, noise), tied)) == 1
    half = Attention(fused).bfloat16()
    assert find_head_spaces(trace(half, noise.bfloat16()), half) == []
    double = Attention(fused).double()
    assert len(find_head_spaces(trace(double, noise.double()), double)) == 2
