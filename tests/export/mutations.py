"""Small valid ONNX files, spoilt at random."""

from collections.abc import Callable

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

_HEADER = '<ir_version: 10, opset_import: ["" : 22, "own" : 1]>'
# Inputs whose names begin with w become initializers.
_SEEDS = (
    """dense (float[N,8] x, float[8,16] w1, float[16] w2, float[4,16] w3, float[4] w4) => (float[N,4] y) {
        h = MatMul(x, w1) a = Add(h, w2) r = Relu(a) n = LayerNormalization(r, w2) p = Softmax(n)
        y = Gemm <transB = 1> (p, w3, w4) }""",
    """images (float[N,4,8,8] x, float[8,4,3,3] w1, float[8] w2, float[8,4,1,1] w3, float[8,4,2,2] w4)
        => (float[N,4,1,1] y) { c = Conv <pads = [1, 1, 1, 1]> (x, w1, w2) r = Relu(c)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r) g = Conv <group = 2> (p, w3)
        f = Constant <value_floats = [1.0, 1.0, 2.0, 2.0]> () u = Resize <mode = "nearest"> (g, , f)
        t = ConvTranspose <strides = [2, 2]> (u, w4) y = GlobalAveragePool(t) }""",
    """attention (float[N,4,8] x, int64[N,4] mask, float[8,8] w1, float[8,8] w2) => (float[N,4,8] y) {
        t = Transpose <perm = [1, 0]> (w1) q = MatMul(x, t) i = Identity(w2) k = MatMul(x, i)
        kt = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, kt) f = Cast <to = 1> (mask)
        one = Constant <value_float = 1.0> () o = Sub(one, f) low = Constant <value = float {-1e9}> ()
        b = Mul(o, low) axes = Constant <value_ints = [1]> () v = Unsqueeze(b, axes) d = Add(s, v)
        e = Softmax(d) y = MatMul(e, x) }""",
    """quantised (float[N,8] x, int8[8,16] w1, float[16] w2, int8[16] w3, float[16,8] w4, int8 w5) => (float[N,8] y) {
        d = DequantizeLinear <axis = 1> (w1, w2, w3) h = MatMul(x, d) s = Constant <value = float {0.1}> ()
        q = QuantizeLinear(w4, s, w5) e = DequantizeLinear(q, s, w5) y = MatMul(h, e) }""",
    """branches (float[N,8] x, bool flag, float[8,8] w1) => (float[N,8] y) { h = MatMul(x, w1)
        y = If (flag) < then_branch = yes () => (float[N,8] z) { z = MatMul(h, w1) },
        else_branch = no () => (float[N,8] z2) { c = Constant <value = float {2.0}> () z2 = Mul(h, c) }> }""",
    """loops (float[8] x, int64 n, bool go, float[8,8] w1) => (float[8] y) {
        y = Loop (n, go, x) < body = steps (int64 i, bool b, float[8] s) => (bool b2, float[8] s2)
        { b2 = Identity(b) f = Cast <to = 1> (i) t = Add(s, f) s2 = MatMul(t, w1) }> }""",
    """orders (float[N,8] x, float[8,8] w1, int64 w2) => (float[N,8] y, int64[N,2] best, float[R] counted) {
        c = CumSum(x, w2) h = MatMul(c, w1) k = Constant <value_ints = [2]> () top, best = TopK(h, k)
        a = Constant <value_float = 0.0> () e = Constant <value_float = 5.0> () d = Constant <value_float = 1.0> ()
        counted = Range(a, e, d) y = Neg(h) }""",
    """functions (float[N,8] x, float[8,8] w1, float[8,8] w2) => (float[N,8] y) { h = own.Layer <slope = 0.5> (x, w1)
        y = own.Layer <slope = 0.1> (h, w2) }
        <domain: "own", opset_import: ["" : 22]> Layer <slope> (a, b) => (d)
        { c = MatMul(a, b) d = LeakyRelu <alpha: float = @slope> (c) }""",
)


def seeds() -> list[ModelProto]:
    """Valid models of every kind that is walked: products, images, masks, Q/DQ, bodies, functions, weights beside."""
    rng = np.random.default_rng(0)
    models = []
    for text in _SEEDS:
        model = onnx.parser.parse_model(f"{_HEADER} {text}")
        for value in [value for value in model.graph.input if value.name.startswith("w")]:
            kind = value.type.tensor_type
            shape = [dim.dim_value for dim in kind.shape.dim]
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            array = np.asarray(rng.standard_normal(shape) if dtype == np.float32 else rng.integers(0, 2, shape), dtype)
            model.graph.initializer.append(numpy_helper.from_array(array, value.name))
            model.graph.input.remove(value)
        for node in model.graph.node:
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'layer', 'linear']")
        models.append(model)
    return models


def mutate(rng: np.random.Generator, models: list[ModelProto]) -> bytes:
    """Spoil a model in one way or two, by its fields or in its bytes."""
    model = ModelProto()
    model.CopyFrom(models[rng.integers(len(models))])
    if rng.random() < 0.7:
        for _ in range(rng.integers(1, 3)):
            _FIELDS[rng.integers(len(_FIELDS))](rng, model)
        ways = 0
    else:
        ways = int(rng.integers(1, 3))
    content: bytes = model.SerializeToString()
    for _ in range(ways):
        content = _BYTES[rng.integers(len(_BYTES))](rng, content)
    return content


def _flip(rng: np.random.Generator, content: bytes) -> bytes:
    spoilt = bytearray(content)
    for at in rng.integers(0, max(1, len(content)), rng.integers(1, 9)):
        spoilt[at : at + 1] = bytes([spoilt[at] ^ (1 << rng.integers(8))]) if len(spoilt) > at else b""
    return bytes(spoilt)


def _cut(rng: np.random.Generator, content: bytes) -> bytes:
    return content[: int(rng.integers(len(content) + 1))]


def _splice(rng: np.random.Generator, content: bytes) -> bytes:
    start, end, at = (int(place) for place in np.sort(rng.integers(0, len(content) + 1, 3)))
    kept: bytes = content if rng.random() < 0.5 else content[:start] + content[end:]
    return b"".join((kept[:at], content[start : min(end, start + 64)], kept[at:]))


def _overwrite(rng: np.random.Generator, content: bytes) -> bytes:
    at = int(rng.integers(len(content) + 1))
    noise = rng.bytes(int(rng.integers(1, 17))) if rng.random() < 0.5 else bytes(8)
    return b"".join((content[:at], noise, content[at + len(noise) :]))


_BYTES: tuple[Callable[[np.random.Generator, bytes], bytes], ...] = (_flip, _cut, _splice, _overwrite)
_SIZES = (-1, 0, 1, 2, 3, 7, 2**20, 2**31, 2**32, 2**62, -(2**63))
_OPERATORS = ("MatMul", "Gemm", "Conv", "Cast", "Reshape", "If", "Scan", "Transpose", "DequantizeLinear", "Unknown", "")


def _nodes(model: ModelProto) -> list[NodeProto]:
    inner = [a.g for node in model.graph.node for a in node.attribute if a.HasField("g")]
    return [*model.graph.node, *(n for g in inner for n in g.node), *(n for f in model.functions for n in f.node)]


def _node(rng: np.random.Generator, model: ModelProto) -> NodeProto:
    nodes = _nodes(model) or [model.graph.node.add()]
    return nodes[rng.integers(len(nodes))]


def _tensor(rng: np.random.Generator, model: ModelProto) -> TensorProto:
    inside: list[TensorProto] = [a.t for node in _nodes(model) for a in node.attribute if a.HasField("t")]
    tensors: list[TensorProto] = [*model.graph.initializer, *inside] or [model.graph.initializer.add()]
    return tensors[int(rng.integers(len(tensors)))]


def _value(rng: np.random.Generator, model: ModelProto) -> str:
    names = [name for node in _nodes(model) for name in (*node.input, *node.output)] or ["x"]
    return str(rng.choice([*names, "nowhere", ""]))


def _spoil_dims(rng: np.random.Generator, model: ModelProto) -> None:
    tensor = _tensor(rng, model)
    if tensor.dims and rng.random() < 0.7:
        tensor.dims[int(rng.integers(len(tensor.dims)))] = int(rng.choice(_SIZES))
    else:
        tensor.dims.append(int(rng.choice(_SIZES)))
    if rng.random() < 0.3:
        tensor.ClearField("raw_data")


def _spoil_type(rng: np.random.Generator, model: ModelProto) -> None:
    _tensor(rng, model).data_type = int(rng.integers(0, 32))


def _spoil_data(rng: np.random.Generator, model: ModelProto) -> None:
    tensor = _tensor(rng, model)
    tensor.raw_data = tensor.raw_data[: rng.integers(len(tensor.raw_data) + 1)] + rng.bytes(int(rng.integers(5)))
    if rng.random() < 0.3:
        tensor.string_data.append(b"text")


def _spoil_values(rng: np.random.Generator, model: ModelProto) -> None:
    tensor = _tensor(rng, model)
    extremes = np.array([np.nan, np.inf, -np.inf, 1e38, -3e38, 1e-45, -1e9], np.float32)
    tensor.raw_data = rng.choice(extremes, len(tensor.raw_data) // 4).tobytes() if tensor.raw_data else b""


def _spoil_location(rng: np.random.Generator, model: ModelProto) -> None:
    tensor = _tensor(rng, model)
    tensor.data_location = TensorProto.EXTERNAL
    for key, values in (
        ("location", ("../x", "/etc/passwd", "", "weights.bin", "absent", "a\0b", ".")),
        ("offset", ("0", "-8", "99999999999999", "text")),
        ("length", ("8", "-1", "99999999999999", "")),
    ):
        if rng.random() < 0.8:
            tensor.external_data.add(key=key, value=str(rng.choice(values)))
    if rng.random() < 0.7:
        tensor.ClearField("raw_data")


def _spoil_name(rng: np.random.Generator, model: ModelProto) -> None:
    _tensor(rng, model).name = _value(rng, model)


def _spoil_input(rng: np.random.Generator, model: ModelProto) -> None:
    node = _node(rng, model)
    if node.input and rng.random() < 0.8:
        node.input[int(rng.integers(len(node.input)))] = _value(rng, model)
    elif node.input and rng.random() < 0.5:
        del node.input[-1]
    else:
        node.input.extend([_value(rng, model)] * int(rng.integers(1, 4)))


def _spoil_output(rng: np.random.Generator, model: ModelProto) -> None:
    node = _node(rng, model)
    if node.output and rng.random() < 0.7:
        node.output[0] = _value(rng, model)
    else:
        node.output.append(_value(rng, model))


def _spoil_operator(rng: np.random.Generator, model: ModelProto) -> None:
    node = _node(rng, model)
    if rng.random() < 0.7:
        node.op_type = str(rng.choice(_OPERATORS))
    else:
        node.domain = str(rng.choice(["", "ai.onnx", "own", "com.microsoft", "ai.onnx.ml"]))


def _spoil_attribute(rng: np.random.Generator, model: ModelProto) -> None:
    node = _node(rng, model)
    if node.attribute and rng.random() < 0.5:
        attribute = node.attribute[rng.integers(len(node.attribute))]
        if attribute.ints:
            attribute.ints[int(rng.integers(len(attribute.ints)))] = int(rng.choice(_SIZES))
        elif rng.random() < 0.5:
            attribute.i = int(rng.choice(_SIZES))
        else:
            attribute.type = rng.choice(onnx.AttributeProto.AttributeType.values())
    else:
        name = str(rng.choice(["perm", "group", "axis", "block_size", "to", "transB", "allowzero", "value", "body"]))
        node.attribute.append(helper.make_attribute(name, int(rng.choice(_SIZES))))


def _spoil_graph(rng: np.random.Generator, model: ModelProto) -> None:
    values = [*model.graph.input, *model.graph.output]
    match rng.integers(6):
        case 0 if model.graph.initializer:
            del model.graph.initializer[rng.integers(len(model.graph.initializer))]
        case 1 if values:
            values[rng.integers(len(values))].type.tensor_type.elem_type = int(rng.integers(0, 32))
        case 2 if values:
            values[rng.integers(len(values))].name = _value(rng, model)
        case 3 if model.graph.node:
            model.graph.node.append(model.graph.node[rng.integers(len(model.graph.node))])
        case 4:
            model.graph.sparse_initializer.add().values.name = _value(rng, model)
        case _:
            model.graph.value_info.append(
                helper.make_tensor_value_info(_value(rng, model), int(rng.integers(0, 24)), [2])
            )


def _spoil_model(rng: np.random.Generator, model: ModelProto) -> None:
    match rng.integers(5):
        case 0:
            model.ir_version = int(rng.choice([0, 1, 3, 4, 7, 9, 13, 14, 99, 2**40]))
        case 1 if model.opset_import:
            model.opset_import[0].version = int(rng.choice([-1, 0, 1, 6, 9, 13, 20, 23, 24, 27, 99, 2**40]))
        case 2:
            del model.opset_import[:]
        case 3 if model.functions:
            model.functions[0].node[0].op_type, model.functions[0].node[0].domain = "Layer", "own"
        case _:
            node = _node(rng, model)
            scopes = str(
                rng.choice(["[" * 5000, "-" * 5000 + "1", "['a', 'b'", "__import__('os')", "[1, 2, 3]", "9" * 9999])
            )
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=scopes)


_FIELDS = (
    _spoil_attribute,
    _spoil_data,
    _spoil_dims,
    _spoil_graph,
    _spoil_input,
    _spoil_location,
    _spoil_model,
    _spoil_name,
    _spoil_operator,
    _spoil_output,
    _spoil_type,
    _spoil_values,
)
