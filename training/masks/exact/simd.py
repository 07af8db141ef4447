"""A small vector language inside numba: Python functions that write LLVM vector code.

numba vectorises loops when it can prove that it may. The mask kernels need registers to be held across hundreds of
steps of a selection network, which no loop expresses, so their inner steps are written with this file: a function
decorated with `vector_op` can be called from numba code like any other; when numba compiles the call, the function
runs once, and its arithmetic on `Value`s becomes straight-line vector instructions. Vectors wider than the machine's
registers are split by LLVM, so the same code runs with AVX-512, AVX2 or SSE.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

# llvmlite and numba publish no types: these names say what is meant.
ElementType = Any  # ir.Type of a scalar, or of a vector
_Builder = Any  # ir.IRBuilder
_Register = Any  # ir.Value

INT8, INT16, INT32, INT64 = (ir.IntType(width) for width in (8, 16, 32, 64))
FLOAT32, FLOAT64 = ir.FloatType(), ir.DoubleType()

_FLOATS = (FLOAT32, FLOAT64)
_CACHE_LINE = 64  # bytes
_ELEMENT = {
    types.uint8: INT8,
    types.int16: INT16,
    types.uint16: INT16,
    types.int32: INT32,
    types.int64: INT64,
}


class Value:
    """A scalar or a vector in a register, with the operators of numpy. Integers are signed.

    Python numbers in an operation become constants, repeated over the lanes.
    """

    def __init__(self, builder: _Builder, value: _Register) -> None:
        self.builder = builder
        self.value = value

    @property
    def lanes(self) -> int:
        """Elements of the vector; 0 for a scalar."""
        return self.value.type.count if isinstance(self.value.type, ir.VectorType) else 0

    @property
    def element(self) -> ElementType:
        """LLVM type of one element."""
        return self.value.type.element if self.lanes else self.value.type

    def _type(self, element: ElementType) -> ElementType:
        return ir.VectorType(element, self.lanes) if self.lanes else element

    def constant(self, number: float) -> _Register:
        """`number` in this value's type and lanes; integers wrap around, so `1 << 31` is the sign bit."""
        if isinstance(self.element, ir.IntType) and number >= 1 << (self.element.width - 1):
            number -= 1 << self.element.width
        return ir.Constant(self.value.type, [number] * self.lanes if self.lanes else number)

    def _apply(self, instruction: str, other: "Value | float") -> "Value":
        right = other.value if isinstance(other, Value) else self.constant(other)
        if self.element in _FLOATS:
            instruction = f"f{instruction}"
        return Value(self.builder, getattr(self.builder, instruction)(self.value, right))

    def __add__(self, other: "Value | float") -> "Value":
        return self._apply("add", other)

    def __sub__(self, other: "Value | float") -> "Value":
        return self._apply("sub", other)

    def __mul__(self, other: "Value | float") -> "Value":
        return self._apply("mul", other)

    def __and__(self, other: "Value | int") -> "Value":
        return self._apply("and_", other)

    def __or__(self, other: "Value | int") -> "Value":
        return self._apply("or_", other)

    def __xor__(self, other: "Value | int") -> "Value":
        return self._apply("xor", other)

    def __lshift__(self, places: int) -> "Value":
        return self._apply("shl", places)

    def __rshift__(self, places: int) -> "Value":
        return self._apply("ashr", places)

    def compare(self, operator: str, other: "Value | float") -> "Value":
        """Lanes of one bit: `==`, `>=`, `>` ... as text, because Python's `==` must stay a bool."""
        right = other.value if isinstance(other, Value) else self.constant(other)
        compare = self.builder.fcmp_ordered if self.element in _FLOATS else self.builder.icmp_signed
        return Value(self.builder, compare(operator, self.value, right))

    def where(self, if_true: "Value | Any", if_false: "Value | Any") -> "Value":
        """Choose by this value, lanes of one bit."""
        return Value(self.builder, self.builder.select(self.value, if_true.value, if_false.value))

    def like(self, number: float) -> "Value":
        """A value of this type that holds `number` in every lane."""
        return Value(self.builder, self.constant(number))

    def intrinsic(self, name: str, *others: "Value | float") -> "Value":
        """LLVM's `llvm.<name>` on integers of one type: smax, smin, sadd.sat, ssub.sat, ctpop."""
        values = [self.value, *(o.value if isinstance(o, Value) else self.constant(o) for o in others)]
        kind = f"v{self.lanes}i{self.element.width}"
        signature = ir.FunctionType(self.value.type, [self.value.type] * len(values))
        insert: Any = cgutils.get_or_insert_function  # untyped
        function = insert(self.builder.module, signature, f"llvm.{name}.{kind}")
        return Value(self.builder, self.builder.call(function, values))

    def to(self, element: ElementType) -> "Value":
        """Convert numbers: a float to a wider one or an integer (towards zero), an integer to a float or narrower."""
        if element in _FLOATS:
            convert = self.builder.fpext if self.element in _FLOATS else self.builder.sitofp
        else:
            convert = self.builder.fptosi if self.element in _FLOATS else self.builder.trunc
        return Value(self.builder, convert(self.value, self._type(element)))

    def unsigned_to(self, element: ElementType) -> "Value":
        """Widen an integer with zeros."""
        return Value(self.builder, self.builder.zext(self.value, self._type(element)))

    def bits_as(self, element: ElementType, lanes: int | None = None) -> "Value":
        """The same bits seen as elements of another type."""
        lanes = self.lanes if lanes is None else lanes
        target = ir.VectorType(element, lanes) if lanes else element
        return Value(self.builder, self.builder.bitcast(self.value, target))

    def lane(self, index: int) -> "Value":
        """One element, as a scalar."""
        return Value(self.builder, self.builder.extract_element(self.value, ir.Constant(INT32, index)))

    def shuffle(self, other: "Value", places: Sequence[int]) -> "Value":
        """Lanes `places` of the two vectors one after the other."""
        mask = ir.Constant(ir.VectorType(INT32, len(places)), list(places))
        return Value(self.builder, self.builder.shuffle_vector(self.value, other.value, mask))


def maximum(left: Value, right: Value) -> Value:
    """Lane by lane the larger; for floats neither may be NaN."""
    if left.element == FLOAT32:
        return left.compare(">", right).where(left, right)
    return left.intrinsic("smax", right)


def minimum(left: Value, right: Value) -> Value:
    """Lane by lane the smaller, integers only."""
    return left.intrinsic("smin", right)


class Buffer:
    """A flat array that a `vector_op` was called with. Positions count elements; alignment is not assumed."""

    def __init__(self, builder: _Builder, dtype: Any, data: _Register) -> None:
        self.builder = builder
        self.dtype = dtype
        self.data = data
        self.item_bytes: int = _ELEMENT[dtype].width // 8

    def _pointer(self, at: Value | int, target: ElementType) -> _Register:
        position = at.value if isinstance(at, Value) else ir.Constant(INT64, at)
        return self.builder.bitcast(self.builder.gep(self.data, [position]), target.as_pointer())

    def load(self, at: Value | int, lanes: int) -> Value:
        """`lanes` elements from position `at`."""
        loaded = self.builder.load(self._pointer(at, ir.VectorType(_ELEMENT[self.dtype], lanes)))
        loaded.align = self.item_bytes
        return Value(self.builder, loaded)

    def store(self, at: Value | int, vector: Value) -> None:
        """Write a vector of this buffer's element type at position `at`."""
        stored = self.builder.store(vector.value, self._pointer(at, vector.value.type))
        stored.align = self.item_bytes

    def prefetch(self, at: Value, count: int) -> None:
        """Ask for `count` elements from position `at`, which may lie outside the buffer, to be brought to the cache."""
        address = self._pointer(at, INT8)
        signature = ir.FunctionType(ir.VoidType(), [address.type, INT32, INT32, INT32])
        insert: Any = cgutils.get_or_insert_function  # untyped
        prefetch = insert(self.builder.module, signature, "llvm.prefetch.p0")
        read, keep_in_l2, data = (ir.Constant(INT32, code) for code in (0, 2, 1))
        for first in range(0, count, _CACHE_LINE // self.item_bytes):
            line = self._pointer(at + first, INT8)
            self.builder.call(prefetch, [line, read, keep_in_l2, data])


def vector_op(emit: Callable[..., None]) -> Any:
    """Make a function that emits vector code callable from numba code.

    Arrays reach it as `Buffer`s, constant integers as Python ints, other integers as 64-bit `Value`s.
    """

    def typed(_: Any, *arguments: Any) -> Any:
        def generate(context: Any, builder: _Builder, signature: Any, values: Sequence[_Register]) -> Any:
            emit(*(_argument(context, builder, *pair) for pair in zip(signature.args, values, strict=True)))
            return context.get_dummy_value()

        return types.void(*arguments), generate

    context = inspect.Parameter("context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(emit).parameters.values()
    typed.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]  # what numba reads
    typed.__name__ = emit.__name__
    typed.__doc__ = emit.__doc__
    return intrinsic(prefer_literal=True)(typed)


def _argument(context: Any, builder: _Builder, kind: Any, value: _Register) -> Buffer | Value | int:
    if isinstance(kind, types.Array):
        return Buffer(builder, kind.dtype, context.make_array(kind)(context, builder, value).data)
    if isinstance(kind, types.IntegerLiteral):
        return int(kind.literal_value)
    return Value(builder, context.cast(builder, value, kind, types.intp))


def deinterleave(vectors: Sequence[Value]) -> list[Value]:
    """Part M consecutive vectors of L lanes by position modulo M: lane l of result j was element l*M + j.

    Even M is halved by splitting pairs into even and odd elements; an odd M is picked from one wide vector.
    """
    count, lanes = len(vectors), vectors[0].lanes
    if count == 1:
        return list(vectors)
    if count % 2:
        wide = _concatenate(vectors)
        return [wide.shuffle(wide, range(j, lanes * count, count)) for j in range(count)]
    pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
    even = deinterleave([first.shuffle(second, range(0, 2 * lanes, 2)) for first, second in pairs])
    odd = deinterleave([first.shuffle(second, range(1, 2 * lanes, 2)) for first, second in pairs])
    return [vector for pair in zip(even, odd, strict=True) for vector in pair]


def _concatenate(vectors: Sequence[Value]) -> Value:
    wide, lanes = vectors[0], vectors[0].lanes
    for vector in vectors[1:]:
        widened = vector.shuffle(vector, [lane % lanes for lane in range(wide.lanes)])
        wide = wide.shuffle(widened, range(wide.lanes + lanes))
    return wide
