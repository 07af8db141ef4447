"""Whole networks, built as people build them: every chosen weight is N:M, and the network still works."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.training.convert.networks import violations, weight_of
from tests.training.zoo import SENTENCES, SMALL, efficientnet_lite0, efficientnet_lite0_inputs, minilm
from tnm_pipeline.training.convert import convert
from tnm_pipeline.training.convert.batch import Batch, forward
from tnm_pipeline.training.layout import to_gemm
from tnm_pipeline.training.masks import solve
from tnm_pipeline.training.pattern import Pattern

CHOSEN = {  # all but the first, the last, and what has too few inputs
    "resnet": {
        *(f"{block}.body.{layer}" for block in "45" for layer in "03"),
        *(f"{block}.body.{layer}" for block in "67" for layer in "036"),
        *(f"{block}.downsample.0" for block in "567"),
    },
    "vit": {
        f"layers.{block}.{layer}"
        for block in range(2)
        for layer in ("attention.qkv", "attention.projection", "mlp.0", "mlp.2")
    },
    "bert": {
        f"encoder.layer.{block}.{layer}"
        for block in range(2)
        for layer in (
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "intermediate.dense",
            "output.dense",
        )
    },
}


@cache
def built(name: str) -> nn.Module:
    return SMALL[name][0]()


def output_of(model: nn.Module, batch: Batch) -> Tensor:
    with torch.no_grad():
        output = forward(model, batch)
    return output if isinstance(output, Tensor) else output["last_hidden_state"]  # type: ignore[index]  # of transformers: a dict


@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
@pytest.mark.parametrize("name", SMALL)
def test_every_chosen_weight_holds_the_pattern_and_the_fit_helps(name: str, text: str) -> None:
    inputs = SMALL[name][1]
    pattern = Pattern.parse(text)
    dense = built(name)
    held_out = inputs(16, 100)
    errors: dict[str, float] = {}
    for method in ("magnitude", "admm"):
        model = copy.deepcopy(dense)
        conversion = convert(model, pattern, [inputs(16, seed) for seed in range(4)], method=method)
        assert CHOSEN[name] <= {layer.name for layer in conversion.layers}
        for layer in conversion.layers:
            assert violations(weight_of(model, layer.name), pattern) == 0
            assert layer.violations == 0
        wanted, got = output_of(dense, held_out), output_of(model, held_out)
        assert bool(torch.isfinite(got).all())
        errors[method] = float((got - wanted).norm() / wanted.norm())
    assert errors["admm"] < errors["magnitude"]


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean over real tokens, of length 1."""
    mask = batch["attention_mask"][..., None]
    return F.normalize((output_of(model, batch) * mask).sum(1) / mask.sum(1))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
def test_a_sentence_encoder_keeps_its_embeddings(text: str) -> None:
    dense, tokenizer = minilm()
    batches = [dict(tokenizer(SENTENCES[i : i + 8], padding=True, return_tensors="pt")) for i in range(0, 40, 8)]
    pattern = Pattern.parse(text)
    model, by_magnitude = copy.deepcopy(dense), copy.deepcopy(dense)
    conversion = convert(model, pattern, batches)
    assert len(conversion.layers) == 36
    for layer in conversion.layers:
        weight = weight_of(by_magnitude, layer.name)
        weight *= solve(weight, pattern)
    for layer in conversion.layers[:6]:
        assert violations(weight_of(model, layer.name), pattern) == 0
    cosines = [cosine(dense, other, batches) for other in (model, by_magnitude)]
    assert cosines[0] > cosines[1] + 0.15
    assert cosines[0] > 0.8


def cosine(dense: nn.Module, model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """Mean over sentences of that of their two embeddings."""
    return float(torch.cat([(embed(model, batch) * embed(dense, batch)).sum(1) for batch in batches]).mean())


@pytest.mark.slow
@pytest.mark.parametrize("text", ["2:4", "2:4-T"])
def test_the_pointwise_convolutions_of_an_efficientnet_are_converted(text: str) -> None:
    model = efficientnet_lite0()
    pattern = Pattern.parse(text)
    pointwise = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.groups == 1
    }
    conversion = convert(model, pattern, [efficientnet_lite0_inputs(2, seed) for seed in range(2)])
    assert {layer.name for layer in conversion.layers} == pointwise
    assert conversion.batch_norms == sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    for name in pointwise:
        weight = weight_of(model, name)
        assert violations(weight, pattern) == 0
        assert float((to_gemm(weight) != 0).double().mean()) > 0.45
    skipped = {layer.name: layer.reason for layer in conversion.plan.skipped}
    assert skipped["_conv_stem"] == "registered first, kept dense (keep_first = true)"
    assert "grouped convolution" in skipped["_blocks.0._depthwise_conv"]
    assert bool(torch.isfinite(output_of(model, efficientnet_lite0_inputs(2, 9))).all())
