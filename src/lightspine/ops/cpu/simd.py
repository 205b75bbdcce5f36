"""SIMD vectors for numba: one wide register with arithmetic, memory access and horizontal sums.

Numba's automatic vectorizer gives up on loops over several arrays that might overlap, such as those of the
scan. The kernels therefore use explicit vectors of 16 float32 or 8 float64 (64 bytes), which LLVM maps to the
registers of the machine: one with AVX-512, two with AVX2, four with NEON. There are no compiler flags and no
source per instruction set.

Reduced precision exists in memory only: a float16 array is passed as uint16, a bfloat16 array as int16, and
`load` and `store` convert.
"""

# numba gives an intrinsic its typing context and reads the names of its arguments.
# ruff: noqa: ARG001

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import intrinsic, lower_builtin, models, register_model

VECTOR_BYTES = 64
# Added to a float32, it leaves no bits for the fraction: the sum is SHIFT + the nearest integer.
SHIFT = 1.5 * 2**23

# Allow fused multiply-add and -0 equal to 0, but no reordering: the polynomials rely on the order.
_FLAGS = ("contract", "nsz")
_I1, _I16, _I32 = ir.IntType(1), ir.IntType(16), ir.IntType(32)


class VectorType(types.Type):
    """Vector of float32 or float64 that fills 64 bytes."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        self.lanes = VECTOR_BYTES * 8 // dtype.bitwidth
        super().__init__(name=f"vector({dtype} x {self.lanes})")

    @property
    def llvm(self) -> ir.VectorType:
        """The LLVM type."""
        return ir.VectorType(ir.FloatType() if self.dtype == types.float32 else ir.DoubleType(), self.lanes)


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: VectorType) -> None:
        super().__init__(dmm, fe_type, fe_type.llvm)


def _splat(builder: Any, scalar: Any, llvm: ir.VectorType) -> Any:
    empty = ir.Constant(llvm, ir.Undefined)
    first = builder.insert_element(empty, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(
        first, empty, ir.Constant(ir.VectorType(_I32, llvm.count), [0] * llvm.count)
    )


def _as_vector(context: Any, builder: Any, value: Any, given: types.Type, vector: VectorType) -> Any:
    if isinstance(given, VectorType):
        return value
    return _splat(builder, context.cast(builder, value, given, vector.dtype), vector.llvm)


def _declare_arithmetic(function: Callable, instruction: str) -> None:
    @infer_global(function)
    class Template(AbstractTemplate):
        def generic(self, args: tuple, kws: dict) -> Any:
            vectors = [a for a in args if isinstance(a, VectorType)]
            scalars = [a for a in args if isinstance(a, types.Number | types.Literal)]
            if not kws and len(args) == 2 and vectors and len(vectors) + len(scalars) == 2:
                return signature(vectors[0], *args)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        values = [
            _as_vector(context, builder, v, t, sig.return_type) for v, t in zip(args, sig.args, strict=True)
        ]
        return getattr(builder, instruction)(*values, flags=_FLAGS)

    for pair in ((VectorType, VectorType), (VectorType, types.Number), (types.Number, VectorType)):
        lower_builtin(function, *pair)(lower)


_declare_arithmetic(operator.add, "fadd")
_declare_arithmetic(operator.sub, "fsub")
_declare_arithmetic(operator.mul, "fmul")
_declare_arithmetic(operator.truediv, "fdiv")


def _memory_vector(dtype: types.Type) -> VectorType:
    return VectorType(types.float64 if dtype == types.float64 else types.float32)


def _memory_element(dtype: types.Type) -> ir.Type:
    if dtype == types.uint16:
        return ir.HalfType()
    if dtype == types.int16:
        return _I16
    return _memory_vector(dtype).llvm.element


def _pointer(
    context: Any, builder: Any, array_type: types.Array, array: Any, index: Any
) -> tuple[Any, ir.VectorType]:
    memory = ir.VectorType(_memory_element(array_type.dtype), _memory_vector(array_type.dtype).lanes)
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), memory.as_pointer()), memory


def _lane_mask(builder: Any, count: Any, lanes: int) -> Any:
    numbers = ir.Constant(ir.VectorType(_I32, lanes), list(range(lanes)))
    return builder.icmp_unsigned("<", numbers, _splat(builder, builder.trunc(count, _I32), numbers.type))


def _intrinsic_call(builder: Any, name: str, result: ir.Type, arguments: list) -> Any:
    function_type = ir.FunctionType(result, [a.type for a in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), arguments)


def _masked_name(operation: str, memory: ir.VectorType) -> str:
    element = {"half": "f16", "float": "f32", "double": "f64"}.get(str(memory.element), str(memory.element))
    return f"llvm.masked.{operation}.v{memory.count}{element}.p0"


def _widen(builder: Any, value: Any, dtype: types.Type, vector: VectorType) -> Any:
    if dtype == types.uint16:
        return builder.fpext(value, vector.llvm)
    if dtype == types.int16:
        bits = ir.VectorType(_I32, vector.lanes)
        shift = ir.Constant(bits, [16] * vector.lanes)
        return builder.bitcast(builder.shl(builder.zext(value, bits), shift), vector.llvm)
    return value


def _narrow(builder: Any, value: Any, dtype: types.Type, memory: ir.VectorType) -> Any:
    if dtype == types.uint16:
        return builder.fptrunc(value, memory)
    if dtype != types.int16:
        return value
    lanes = memory.count
    wide = ir.VectorType(_I32, lanes)

    def constant(number: int) -> Any:
        return ir.Constant(wide, [number] * lanes)

    # Round to nearest, ties to even. A NaN keeps its upper bits and becomes quiet, or they might spell
    # infinity.
    bits = builder.bitcast(value, wide)
    upper = builder.lshr(bits, constant(16))
    odd = builder.and_(upper, constant(1))
    rounded = builder.lshr(builder.add(bits, builder.add(odd, constant(0x7FFF))), constant(16))
    is_nan = builder.fcmp_unordered("uno", value, value)
    return builder.trunc(builder.select(is_nan, builder.or_(upper, constant(0x40)), rounded), memory)


@intrinsic
def load(typingctx: Any, array: types.Array, index: types.Integer, count: types.Integer) -> Any:
    """Load `count` elements of a flat array from `index` on; the lanes beyond them are zero."""
    vector = _memory_vector(array.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        pointer, memory = _pointer(context, builder, sig.args[0], args[0], args[1])
        align = memory.element.get_abi_size(context.target_data) if memory.element != _I16 else 2
        whole = builder.icmp_signed(">=", args[2], ir.Constant(args[2].type, vector.lanes))
        with builder.if_else(whole, likely=True) as (then, otherwise):
            with then:
                full = builder.load(pointer, align=align)
                full_block = builder.block
            with otherwise:
                mask = _lane_mask(builder, args[2], vector.lanes)
                arguments = [pointer, ir.Constant(_I32, align), mask, ir.Constant(memory, None)]
                part = _intrinsic_call(builder, _masked_name("load", memory), memory, arguments)
                part_block = builder.block
        value = builder.phi(memory)
        value.add_incoming(full, full_block)
        value.add_incoming(part, part_block)
        return _widen(builder, value, sig.args[0].dtype, vector)

    return vector(array, types.intp, types.intp), codegen


@intrinsic
def store(
    typingctx: Any, array: types.Array, index: types.Integer, vector: VectorType, count: types.Integer
) -> Any:
    """Store the first `count` lanes in a flat array from `index` on, rounded to its precision."""

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        pointer, memory = _pointer(context, builder, sig.args[0], args[0], args[1])
        align = memory.element.get_abi_size(context.target_data) if memory.element != _I16 else 2
        value = _narrow(builder, args[2], sig.args[0].dtype, memory)
        whole = builder.icmp_signed(">=", args[3], ir.Constant(args[3].type, vector.lanes))
        with builder.if_else(whole, likely=True) as (then, otherwise):
            with then:
                builder.store(value, pointer, align=align)
            with otherwise:
                mask = _lane_mask(builder, args[3], vector.lanes)
                arguments = [value, pointer, ir.Constant(_I32, align), mask]
                _intrinsic_call(builder, _masked_name("store", memory), ir.VoidType(), arguments)
        return context.get_dummy_value()

    return types.void(array, types.intp, vector, types.intp), codegen


@intrinsic
def broadcast(typingctx: Any, scalar: types.Float) -> Any:
    """Return a vector with one float in all lanes."""
    vector = VectorType(scalar)

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        return _splat(builder, args[0], vector.llvm)

    return vector(scalar), codegen


@intrinsic
def load_broadcast(typingctx: Any, array: types.Array, index: types.Integer) -> Any:
    """Return a vector with one element of a flat array in all lanes."""
    vector = _memory_vector(array.dtype)

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        pointer, memory = _pointer(context, builder, sig.args[0], args[0], args[1])
        element = builder.load(builder.bitcast(pointer, memory.element.as_pointer()))
        return _widen(builder, _splat(builder, element, memory), sig.args[0].dtype, vector)

    return vector(array, types.intp), codegen


@intrinsic
def lane_sums(typingctx: Any, array: types.Array, index: types.Integer) -> Any:
    """Return the horizontal sums of consecutive vectors from `index` on, as many as a vector has lanes.

    Pairs of vectors are added crosswise into one that holds partial sums of both, and so on: about a quarter
    of the instructions of separate sums.
    """
    vector = _memory_vector(array.dtype)
    lanes = vector.lanes

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        data = context.make_array(sig.args[0])(context, builder, args[0]).data
        pointer = builder.bitcast(builder.gep(data, [args[1]]), vector.llvm.as_pointer())
        align = vector.llvm.element.get_abi_size(context.target_data)
        rows = [builder.load(builder.gep(pointer, [ir.Constant(_I32, i)]), align=align) for i in range(lanes)]
        width = 1
        while len(rows) > 1:
            # Lane j of a pair's sum belongs to the second vector where bit `width` of j is set.
            sources = [
                j % width + j // (2 * width) * 2 * width + (j // width) % 2 * lanes for j in range(lanes)
            ]
            near = ir.Constant(ir.VectorType(_I32, lanes), sources)
            far = ir.Constant(ir.VectorType(_I32, lanes), [j + width for j in sources])
            rows = [
                builder.fadd(
                    builder.shuffle_vector(a, b, near), builder.shuffle_vector(a, b, far), flags=_FLAGS
                )
                for a, b in zip(rows[::2], rows[1::2], strict=True)
            ]
            width *= 2
        return rows[0]

    return vector(array, types.intp), codegen


@intrinsic
def transpose_tile(
    typingctx: Any,
    source: types.Array,
    index: types.Integer,
    stride: types.Integer,
    target: types.Array,
    target_index: types.Integer,
    target_stride: types.Integer,
) -> Any:
    """Transpose a square of as many rows as a register has lanes, between flat arrays of one dtype.

    Rows begin `stride` elements apart from `index` on, those of the result `target_stride` apart from
    `target_index` on; strides may be negative.
    """
    lanes = _memory_vector(source.dtype).lanes

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        size = sig.args[0].dtype.bitwidth
        # Only bits move: as integers, 16-bit floats need no support by the machine.
        memory = ir.VectorType(ir.IntType(size), lanes)

        def row(array: int, number: int) -> Any:
            data = context.make_array(sig.args[array])(context, builder, args[array]).data
            offset = builder.mul(args[array + 2], ir.Constant(args[array + 2].type, number))
            pointer = builder.gep(data, [builder.add(args[array + 1], offset)])
            return builder.bitcast(pointer, memory.as_pointer())

        rows = [builder.load(row(0, i), align=size // 8) for i in range(lanes)]
        width = 1
        while width < lanes:
            # Exchange the off-diagonal blocks of every pair of blocks of `width` rows and columns.
            upper = [j + lanes - width if j & width else j for j in range(lanes)]
            lower = [j + lanes if j & width else j + width for j in range(lanes)]
            near, far = (ir.Constant(ir.VectorType(_I32, lanes), block) for block in (upper, lower))
            for i in range(lanes):
                if not i & width:
                    first, second = rows[i], rows[i + width]
                    rows[i] = builder.shuffle_vector(first, second, near)
                    rows[i + width] = builder.shuffle_vector(first, second, far)
            width *= 2
        for i, value in enumerate(rows):
            builder.store(value, row(3, i), align=size // 8)
        return context.get_dummy_value()

    signature = types.void(source, types.intp, types.intp, target, types.intp, types.intp)
    return signature, codegen


def _declare_limit(comparison: str, doc: str) -> Any:
    def function(typingctx: Any, vector: VectorType, limit: types.Float) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
            limits = _as_vector(context, builder, args[1], sig.args[1], vector)
            return builder.select(builder.fcmp_ordered(comparison, args[0], limits), limits, args[0])

        return vector(vector, types.float64), codegen

    function.__doc__ = doc
    return intrinsic(function)


maximum = _declare_limit("<", "Return max(vector, limit) in every lane; a NaN stays a NaN.")
minimum = _declare_limit(">", "Return min(vector, limit) in every lane; a NaN stays a NaN.")


@intrinsic
def where_negative(typingctx: Any, condition: VectorType, yes: types.Type, no: types.Type) -> Any:
    """Return `yes` in the lanes where `condition` is negative, else `no`; each is a vector or a number."""

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        negative = builder.fcmp_ordered("<", args[0], ir.Constant(condition.llvm, None))
        choices = [_as_vector(context, builder, v, t, condition) for v, t in zip(args, sig.args, strict=True)]
        return builder.select(negative, choices[1], choices[2])

    return condition(condition, yes, no), codegen


@intrinsic
def zero_below(typingctx: Any, condition: VectorType, limit: types.Float, value: types.Type) -> Any:
    """Return `value` with 0 in the lanes where `condition` is below the limit."""

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        limits = _as_vector(context, builder, args[1], sig.args[1], condition)
        below = builder.fcmp_ordered("<", args[0], limits)
        return builder.select(below, ir.Constant(condition.llvm, None), args[2])

    return condition(condition, types.float64, condition), codegen


def _declare_llvm_function(name: str, doc: str) -> Any:
    def function(typingctx: Any, vector: VectorType) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
            suffix = f"v{vector.lanes}f{vector.dtype.bitwidth}"
            return _intrinsic_call(builder, f"llvm.{name}.{suffix}", vector.llvm, [args[0]])

        return vector(vector), codegen

    function.__doc__ = doc
    return intrinsic(function)


absolute = _declare_llvm_function("fabs", "Return the absolute value of every lane.")
llvm_exp = _declare_llvm_function(
    "exp", "Return e to the power of every lane, by the C library: one call per lane."
)
llvm_log = _declare_llvm_function(
    "log", "Return the logarithm of every lane, by the C library: one call per lane."
)


@intrinsic
def power_of_two(typingctx: Any, vector: VectorType) -> Any:
    """Return 2^n for float32 lanes that hold SHIFT + n, with an integer n from -126 to 128.

    The lowest bits of such a lane are those of n. 2^128 is infinity.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: tuple) -> Any:
        whole = ir.VectorType(_I32, vector.lanes)
        exponent = builder.shl(builder.bitcast(args[0], whole), ir.Constant(whole, [23] * vector.lanes))
        one = ir.Constant(whole, [127 << 23] * vector.lanes)
        return builder.bitcast(builder.add(exponent, one), vector.llvm)

    return vector(vector), codegen
