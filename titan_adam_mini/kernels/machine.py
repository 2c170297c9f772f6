"""Low-level helpers for the compiled loops: pointers, SIMD vectors, bfloat16, a counter shared by threads."""

from __future__ import annotations

from typing import Any

import llvmlite.ir as ir
import numpy as np
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from . import rounding

LANES = 32
MASK, GOLDEN, MIX1, MIX2 = rounding.MASK, rounding.GOLDEN, rounding.FIRST, rounding.SECOND

compiled = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
"""For functions that are called only by compiled ones."""
inlined = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True, inline="always")
"""For functions with few callers: numba compiles an inlined function again in every caller, which is slow."""


def entry(function: Any) -> Any:
    """Compile an entry point, and cache the result on disk if possible."""
    try:
        return njit(nogil=True, error_model="numpy", cache=True)(function)
    except RuntimeError:  # neither the package's nor the user's cache folder is writable
        return njit(nogil=True, error_model="numpy")(function)


def element(like: Any) -> Any:
    """The element type of an array or of a class such as np.float32, as numba sees them."""
    return like.dtype if isinstance(like, types.Array) else like.instance_type


@intrinsic
def pointer(typing: Any, address: Any, like: Any) -> Any:
    """A pointer to elements like `like`."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return types.CPointer(element(like))(types.int64, like), code


@intrinsic
def as_like(typing: Any, value: Any, like: Any) -> Any:
    """Cast a number to the type of `like`: numba computes float32 with float64 in float64."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[0], value, signature.return_type)

    return element(like)(value, like), code


@intrinsic
def never_inline(typing: Any) -> Any:
    """Prevent the compiler from inlining the function that calls this: copies take long to compile."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.none(), code


def bit_cast(source: Any, target: Any) -> Any:
    @intrinsic
    def cast(typing: Any, value: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], context.get_value_type(target))

        return target(source), code

    return cast


to_bits = bit_cast(types.float32, types.uint32)
from_bits = bit_cast(types.uint32, types.float32)


@intrinsic
def next_number(typing: Any, address: Any) -> Any:
    """The next value of a counter shared by threads (atomic)."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), code


@intrinsic
def square_lanes(typing: Any, start: Any, number: Any) -> Any:
    """Sum of squares of `number` contiguous elements, a multiple of LANES: LANES parallel sums, then halved to one."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(context.get_value_type(start.dtype), LANES)
        total = cgutils.alloca_once_value(builder, ir.Constant(vector, [0.0] * LANES))
        step = ir.Constant(ir.IntType(64), LANES)
        with cgutils.for_range_slice(builder, ir.Constant(ir.IntType(64), 0), args[1], step) as (index, _):
            place = builder.bitcast(builder.gep(args[0], [index]), vector.as_pointer())
            values = builder.load(place, align=start.dtype.bitwidth // 8)
            builder.store(builder.fadd(builder.load(total), builder.fmul(values, values)), total)
        result, width = builder.load(total), LANES
        while width > 1:
            width //= 2
            halves = [
                ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(at, at + width))) for at in (0, width)
            ]
            low, high = (builder.shuffle_vector(result, result, half) for half in halves)
            result = builder.fadd(low, high)
        return builder.extract_element(result, ir.Constant(ir.IntType(32), 0))

    return start.dtype(start, types.int64), code


@inlined
def squares(start: Any, size: int, like: Any) -> Any:
    """Sum of squares of `size` contiguous elements: the remainder after the lanes is added sequentially."""
    even = size // LANES * LANES
    total = square_lanes(start, even)
    for at in range(even, size):
        total = as_like(total + start[at] * start[at], like)
    return total


@intrinsic
def update_lanes(
    typing: Any,
    param: Any,
    grad: Any,
    exp_avg: Any,
    number: Any,
    keep: Any,
    new: Any,
    shrink: Any,
    scale: Any,
    ahead: Any,
) -> Any:
    """Update `number` contiguous elements, a multiple of LANES, with one scale or a pointer to one scale per element.

    Prefetches the gradients `ahead`, which are summed next, while parameters and momentum are loaded.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bytes_, int64 = param.dtype.bitwidth // 8, ir.IntType(64)
        vector = ir.VectorType(context.get_value_type(param.dtype), LANES)
        flag, place = ir.IntType(32), ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [place, flag, flag, flag])
        fetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")

        def spread(value: Any) -> Any:
            first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, flag(0))
            return builder.shuffle_vector(first, first, ir.Constant(ir.VectorType(flag, LANES), [0] * LANES))

        keeps, news, shrinks = map(spread, args[4:7])
        each = isinstance(scale, types.CPointer)
        scales = None if each else spread(args[7])
        with cgutils.for_range_slice(builder, int64(0), args[3], int64(LANES)) as (index, _):
            p, g, m = (builder.bitcast(builder.gep(base, [index]), vector.as_pointer()) for base in args[:3])
            ahead = builder.gep(args[1], [builder.add(index, args[8])])
            for line in range(0, LANES, 64 // bytes_):
                builder.call(
                    fetch, [builder.bitcast(builder.gep(ahead, [int64(line)]), place), flag(0), flag(3), flag(1)]
                )
            average = builder.fmul(builder.load(m, align=bytes_), keeps)
            average = builder.fadd(average, builder.fmul(builder.load(g, align=bytes_), news))
            builder.store(average, m, align=bytes_)
            value = builder.fmul(builder.load(p, align=bytes_), shrinks)
            own = scales
            if each:
                own = builder.load(builder.bitcast(builder.gep(args[7], [index]), vector.as_pointer()), align=bytes_)
            builder.store(builder.fsub(value, builder.fmul(average, own)), p, align=bytes_)
        return context.get_dummy_value()

    kinds = [*[param.dtype] * 3, scale if isinstance(scale, types.CPointer) else param.dtype]
    return types.none(param, grad, exp_avg, types.int64, *kinds, types.int64), code


@intrinsic
def wide(typing: Any, value: Any) -> Any:
    """A stored value as a number; uint16 is a bfloat16."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if value != types.uint16:
            return args[0]
        bits = builder.shl(builder.zext(args[0], ir.IntType(32)), ir.Constant(ir.IntType(32), 16))
        return builder.bitcast(bits, ir.FloatType())

    return (types.float32 if value == types.uint16 else value)(value), code


@compiled
def nearest(value: Any) -> Any:
    """A float as the 16 bits of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = to_bits(np.float32(value))
    odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
    rounded = np.uint32(np.uint32(np.uint32(bits + np.uint32(0x7FFF)) + odd) >> np.uint32(16))
    number = np.uint32(bits & np.uint32(0x7FFFFFFF)) <= np.uint32(0x7F800000)
    return np.uint16(rounded if number else np.uint32(0x7FC0))


@compiled
def mix(x: Any) -> Any:
    """See `rounding.mix`; in 32 bits, so that it vectorises."""
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(16))) * np.uint32(MIX1))
    x = np.uint32(np.uint32(x ^ (x >> np.uint32(15))) * np.uint32(MIX2))
    return np.uint32(x ^ (x >> np.uint32(16)))


@compiled
def salt(index: Any, key: Any) -> Any:
    """The part of the key shared by all elements whose index has the same upper 32 bits."""
    return np.uint32(key ^ mix(np.uint32(np.uint32(np.uint64(index) >> np.uint64(32)) + np.uint32(GOLDEN))))


@compiled
def stochastic(value: Any, low: Any, salted: Any) -> Any:
    """A float, stochastically rounded to bfloat16 bits (see `rounding.stochastic`); `low`: 32 low bits of its index."""
    noise = np.uint32(mix(np.uint32(low ^ salted)) & np.uint32(0xFFFF))
    bits = to_bits(np.float32(value))
    finite = np.uint32(bits & np.uint32(0x7FFFFFFF)) < np.uint32(0x7F800000)
    return np.uint16(np.uint32(bits + noise) >> np.uint32(16)) if finite else nearest(value)
