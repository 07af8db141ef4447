"""What an engine computes in, from layers as NVIDIA documents the engine inspector's JSON."""

import pytest

from tnm_pipeline.export.building.engine_precision import check_engine_precision
from tnm_pipeline.export.errors import BuildFailed


def convolution(kind: str, name: str = "conv1 + relu1") -> dict[str, object]:
    return {"Name": name, "LayerType": "CaskConvolution", "Weights": {"Type": kind, "Count": 864}}


FUSED = {"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", "Outputs": [{"Format/Datatype": "Float"}]}


@pytest.mark.parametrize(("kind", "precision"), [("Half", "fp16"), ("Float", "fp32"), ("BFloat16", "bf16")])
def test_as_promised(kind: str, precision: str) -> None:
    check_engine_precision([convolution(kind), FUSED, {"Name": "only a name"}], precision, ())


@pytest.mark.parametrize(("kind", "precision"), [("Float", "fp16"), ("Half", "fp32"), ("Half", "bf16")])
def test_a_layer_in_another_type_is_refused(kind: str, precision: str) -> None:
    with pytest.raises(BuildFailed, match=rf"conv1 \+ relu1 with weights of type {kind}, and {precision} was promised"):
        check_engine_precision([FUSED, convolution(kind)], precision, ())


def test_quantized_weights_are_no_floating_type() -> None:
    check_engine_precision([convolution("Int8")], "fp16", ())


def test_nodes_that_stay_in_fp32() -> None:
    check_engine_precision([convolution("Float")], "fp16", ("conv1",))
    with pytest.raises(BuildFailed):
        check_engine_precision([convolution("Float")], "fp16", ("conv",))
