"""The operations of ATen, written with ``jax.numpy``: what `metarun.engine.xla` makes of a recording.

Functions take the arguments of the operations and return what these return. An operation that is not here is refused by
name. To add one, add a line to ``BY_NAME`` and one to ``OPERATIONS`` in ``tests/test_xla.py``.
"""

import math
import operator
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import torch
from jax import lax, nn

from metarun.engine.recorder import CannotRecord
from metarun.engine.xla import Operation


def type_of(dtype: torch.dtype) -> Any:
    """Return the type of JAX for one of torch."""
    return jnp.dtype(str(dtype).removeprefix("torch."))


def axes(dim: Any) -> Any:
    """No axes at all mean all of them."""
    return tuple(dim) or None if isinstance(dim, list | tuple) else dim


def reduced(function: Operation) -> Operation:
    return lambda x, dim=None, keepdim=False, dtype=None: function(
        x if dtype is None else x.astype(type_of(dtype)), axis=axes(dim), keepdims=keepdim
    )


def filled(value: Any) -> Operation:
    def of(size: Any, *args: Any, dtype: Any = None, **rest: Any) -> Any:
        return jnp.full(tuple(size), value, type_of(dtype or torch.get_default_dtype()))

    return of


def filled_like(value: Any) -> Operation:
    return lambda x, *args, dtype=None, **rest: jnp.full_like(x, value, dtype=dtype and type_of(dtype))


def new(value: Any) -> Operation:
    return lambda x, size, *, dtype=None, **rest: jnp.full(tuple(size), value, type_of(dtype) if dtype else x.dtype)


def full(size: Any, value: Any, *, dtype: Any = None, **rest: Any) -> Any:
    return jnp.full(tuple(size), value, None if dtype is None else type_of(dtype))


def arange(*bounds: Any, dtype: Any = None, **rest: Any) -> Any:
    values = jnp.arange(*bounds)
    return values if dtype is None else values.astype(type_of(dtype))


def to(x: Any, *, dtype: Any = None, **rest: Any) -> Any:
    return x if dtype is None else jnp.asarray(x, type_of(dtype))


def expanded(x: Any, size: Sequence[int], *, implicit: bool = False) -> Any:
    shape = [x.shape[i - len(size)] if n == -1 else n for i, n in enumerate(size)]
    return jnp.broadcast_to(x, shape)


def at(axes: int, dim: int, index: Any) -> Any:
    """Return the index that takes ``index`` along one axis and everything along those before and after it."""
    return (slice(None),) * (dim % axes) + (index,)


def part(size: int, start: int | None, end: int | None, step: int) -> slice:
    """Return a slice of an axis; ATen writes its end as a large number."""
    return slice(start, None if end is None or end >= size else end, step)


def sliced(x: Any, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Any:
    return x[at(x.ndim, dim, part(x.shape[dim], start, end, step))]


def selected(x: Any, dim: int, index: int) -> Any:
    return lax.index_in_dim(x, index % x.shape[dim], dim % x.ndim, keepdims=False)


def slice_backward(slope: Any, sizes: Sequence[int], dim: int, start: int | None, end: int | None, step: int) -> Any:
    return select_backward(slope, sizes, dim, part(sizes[dim], start, end, step))


def select_backward(slope: Any, sizes: Sequence[int], dim: int, index: Any) -> Any:
    return jnp.zeros(tuple(sizes), slope.dtype).at[at(len(sizes), dim, index)].set(slope)


def squeezed(x: Any, dim: Any = None) -> Any:
    if x.ndim == 0:
        return x
    named = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return jnp.squeeze(x, tuple(d % x.ndim for d in named if x.shape[d] == 1))


def split(x: Any, size: Any, dim: int = 0) -> Any:
    ends = range(size, x.shape[dim], size) if isinstance(size, int) else list(accumulate(size))[:-1]
    return jnp.split(x, list(ends), axis=dim)


def places(index: Any, dim: int) -> Any:
    """Return the index that takes ``index`` along one axis, and along the others the places of ``index`` itself."""
    where = list(jnp.indices(index.shape, sparse=True))
    where[dim % index.ndim] = index
    return tuple(where)


def gathered(x: Any, dim: int, index: Any, **rest: Any) -> Any:
    return x[places(index, dim)] if x.ndim else x


def scattered(method: str) -> Operation:
    def of(x: Any, dim: int, index: Any, value: Any) -> Any:
        if getattr(value, "ndim", 0):
            value = value[tuple(slice(n) for n in index.shape)]
        return getattr(x.at[places(index, dim)], method)(value)

    return of


def by_indices(indices: Sequence[Any]) -> Any:
    """Return the index of a list in which None takes everything along an axis."""
    return tuple(slice(None) if index is None else index for index in indices)


def index_put(x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False) -> Any:
    place = x.at[by_indices(indices)]
    return place.add(values) if accumulate else place.set(values)


def best(function: Operation, position: Operation) -> Operation:
    def of(x: Any, dim: int, keepdim: bool = False) -> Any:
        return function(x, axis=dim, keepdims=keepdim), position(x, axis=dim, keepdims=keepdim)

    return of


def positions(function: Operation) -> Operation:
    return lambda x, dim=None, keepdim=False: function(x, axis=dim, keepdims=keepdim)


def clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    return jnp.clip(x, min, max)


def divided(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode == "floor":
        return jnp.floor_divide(a, b)
    if rounding_mode is None:
        return jnp.true_divide(a, b)
    kind = jnp.result_type(a, b)
    a, b = jnp.broadcast_arrays(jnp.asarray(a, kind), jnp.asarray(b, kind))
    return lax.div(a, b) if jnp.issubdtype(a.dtype, jnp.integer) else jnp.trunc(a / b)


def softmax_backward(slope: Any, out: Any, dim: int, dtype: Any) -> Any:
    product = slope * out
    return product - out * product.sum(dim, keepdims=True)


def log_softmax_backward(slope: Any, out: Any, dim: int, dtype: Any) -> Any:
    return slope - jnp.exp(out) * slope.sum(dim, keepdims=True)


def backward(function: Operation) -> Operation:
    """Return the derivative of a function along its first argument, as ATen calls it."""
    return lambda slope, x, *more, **named: jax.vjp(lambda x: function(x, *more, **named), x)[1](slope)[0]


def gelu(x: Any, *, approximate: str = "none") -> Any:
    return nn.gelu(x, approximate=approximate == "tanh")


def elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    return scale * jnp.where(x > 0, x, alpha * jnp.expm1(input_scale * jnp.minimum(x, 0)))


def leaky(x: Any, slope: float = 0.01) -> Any:
    return jnp.where(x > 0, x, slope * x)


def padded(x: Any, pad: Sequence[int], value: float = 0.0) -> Any:
    pairs = [(pad[i], pad[i + 1], 0) for i in range(0, len(pad), 2)]
    return lax.pad(x, jnp.asarray(value, x.dtype), [(0, 0, 0)] * (x.ndim - len(pairs)) + pairs[::-1])


def variance(x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return jnp.var(x, axis=axes(dim), ddof=1 if correction is None else correction, keepdims=keepdim)


def convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Any:
    def forwards(x: Any) -> Any:
        return lax.conv_general_dilated(
            x,
            weight,
            tuple(stride),
            [(p, p) for p in padding],
            rhs_dilation=tuple(dilation),
            feature_group_count=groups,
        )

    if transposed:
        settings = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding, strict=True)
        sides = [(n - 1) * s - 2 * p + d * (k - 1) + more + 1 for n, k, s, p, d, more in settings]
        shape = (x.shape[0], weight.shape[1] * groups, *sides)
        (out,) = jax.vjp(forwards, jnp.zeros(shape, x.dtype))[1](x)
    else:
        out = forwards(x)
    return out if bias is None else out + bias.reshape(-1, *(1,) * len(padding))


def convolution_backward(slope: Any, x: Any, weight: Any, bias_sizes: Any, *settings: Any) -> Any:
    *same, wanted = settings
    _, back = jax.vjp(lambda x, weight: convolution(x, weight, None, *same), x, weight)
    summed = slope.sum((0, *range(2, slope.ndim)))
    return tuple(part if want else None for part, want in zip((*back(slope), summed), wanted, strict=True))


def embedding_backward(slope: Any, index: Any, rows: int, padding: int, by_frequency: bool) -> Any:
    if by_frequency:
        raise CannotRecord("gradients of an embedding that are divided by frequencies are not translated to JAX")
    kept = jnp.where((index == padding)[..., None], 0, slope)
    flat = kept.reshape(-1, slope.shape[-1])
    return jnp.zeros((rows, slope.shape[-1]), slope.dtype).at[index.reshape(-1)].add(flat)


def shifted_right(x: Any, bits: Any) -> Any:
    return jnp.right_shift(x, jnp.asarray(bits, x.dtype))


def cumulated(function: Operation) -> Operation:
    def of(x: Any, dim: int, *, dtype: Any = None) -> Any:
        whole = not jnp.issubdtype(x.dtype, jnp.inexact)
        kind = x.dtype if dtype is None and not whole else type_of(dtype or torch.int64)
        return function(x.astype(kind), axis=dim)

    return of


def compared(operation: Operation) -> Operation:
    def of(a: Any, b: Any) -> Any:
        # Torch lets a number without axes take the type of the tensor that it meets, if both are of one kind.
        if jnp.ndim(a) and hasattr(b, "ndim") and not b.ndim and a.dtype.kind == b.dtype.kind:
            b = b.astype(a.dtype)
        elif jnp.ndim(b) and hasattr(a, "ndim") and not a.ndim and a.dtype.kind == b.dtype.kind:
            a = a.astype(b.dtype)
        return operation(a, b)

    return of


def power(x: Any, exponent: Any) -> Any:
    # XLA multiplies for whole exponents only if they are written as such.
    whole = isinstance(exponent, float) and exponent.is_integer()
    return x ** int(exponent) if whole else jnp.power(x, exponent)


def triangle(function: Operation) -> Operation:
    return lambda x, diagonal=0: function(x, diagonal)


def ordered(x: Any, dim: int = -1, descending: bool = False, *, stable: bool | None = None) -> Any:
    order = jnp.argsort(x, axis=dim, descending=descending, stable=True)
    return jnp.take_along_axis(x, order, dim), order


def solution(a: Any, b: Any, left: bool) -> Any:
    if not left:
        return jnp.swapaxes(solution(jnp.swapaxes(a, -1, -2), jnp.swapaxes(b, -1, -2), True), -1, -2)
    vectors = b.ndim == 1 or b.shape == a.shape[:-1]
    return jnp.linalg.solve(a, b[..., None])[..., 0] if vectors else jnp.linalg.solve(a, b)


def no_error(a: Any) -> Any:
    return jnp.zeros(a.shape[:-2], jnp.int32)


def solved(a: Any, b: Any, *, left: bool = True, check_errors: bool = False) -> Any:
    # The matrix takes the place of its decomposition, which only ``solved_again`` reads.
    return solution(a, b, left), a, jnp.zeros(a.shape[:-1], jnp.int32), no_error(a)


def solved_again(a: Any, pivots: Any, b: Any, *, left: bool = True, adjoint: bool = False) -> Any:
    return solution(jnp.swapaxes(a, -1, -2) if adjoint else a, b, left)


def cholesky(a: Any, *, upper: bool = False, check_errors: bool = False) -> Any:
    # Only one triangle is looked at.
    low = jnp.linalg.cholesky(jnp.swapaxes(a, -1, -2) if upper else a, symmetrize_input=False)
    info = jnp.isnan(low).any((-2, -1)).astype(jnp.int32)
    return (jnp.swapaxes(low, -1, -2) if upper else low), info


def largest(x: Any, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    values, order = ordered(x, dim, descending=largest)
    return sliced(values, dim, 0, k), sliced(order, dim, 0, k)


def norm(x: Any, order: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    size, over = jnp.abs(x if dtype is None else x.astype(type_of(dtype))), {"axis": axes(dim), "keepdims": keepdim}
    if order == 0:
        return (size > 0).astype(size.dtype).sum(**over)
    if math.isinf(order):
        return size.max(**over) if order > 0 else size.min(**over)
    return jnp.sum(size**order, **over) ** (1 / order)


def diagonal_matrix(x: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    axes = x.ndim + 1
    if (offset, dim1 % axes, dim2 % axes) != (0, axes - 2, axes - 1):
        raise CannotRecord("only matrices of the last two axes are translated to JAX")
    return x[..., None] * jnp.eye(x.shape[-1], dtype=x.dtype)


def identity(rows: int, columns: int | None = None, *, dtype: Any = None, **rest: Any) -> Any:
    return jnp.eye(rows, columns, dtype=type_of(dtype or torch.get_default_dtype()))


def spaced(start: float, end: float, count: int, *, dtype: Any = None, **rest: Any) -> Any:
    return jnp.linspace(start, end, count, dtype=type_of(dtype or torch.get_default_dtype()))


def elu_backward(slope: Any, alpha: float, scale: float, input_scale: float, of_result: bool, x: Any) -> Any:
    below = x + alpha * scale if of_result else alpha * scale * jnp.exp(input_scale * x)
    return slope * jnp.where(x > 0, scale, input_scale * below)


def diagonal_backward(slope: Any, sizes: Sequence[int], *where: int) -> Any:
    return jax.vjp(lambda x: jnp.diagonal(x, *where), jnp.zeros(tuple(sizes), slope.dtype))[1](slope)[0]


def index_add(x: Any, dim: int, index: Any, source: Any, *, alpha: float = 1) -> Any:
    return x.at[at(x.ndim, dim, index)].add(alpha * source)


def softplus_backward(slope: Any, x: Any, beta: float, threshold: float) -> Any:
    return jnp.where(beta * x > threshold, slope, slope * nn.sigmoid(beta * x))


def softplus(x: Any, beta: float = 1, threshold: float = 20) -> Any:
    return jnp.where(beta * x > threshold, x, nn.softplus(beta * x) / beta)


def triangular(a: Any, b: Any, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Any:
    shape = jnp.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (jnp.broadcast_to(x, (*shape, *x.shape[-2:])) for x in (a, b))
    return lax.linalg.triangular_solve(a, b, left_side=left, lower=not upper, unit_diagonal=unitriangular)


def same(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def reshaped(x: Any, size: Sequence[int]) -> Any:
    return x.reshape(tuple(size))


def added(a: Any, b: Any, *, alpha: float = 1) -> Any:
    return a + (b if alpha == 1 else alpha * b)


def subtracted(a: Any, b: Any, *, alpha: float = 1) -> Any:
    return a - (b if alpha == 1 else alpha * b)


def product_added(product: Operation) -> Operation:
    return lambda c, a, b, *, beta=1, alpha=1: beta * c + alpha * product(a, b)


def masked(x: Any, mask: Any, value: Any) -> Any:
    return jnp.where(mask, jnp.asarray(value, x.dtype), x)


matmul = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


BY_NAME: dict[str, Operation] = {
    "add.Tensor add.Scalar": added,
    "sub.Tensor sub.Scalar": subtracted,
    "rsub.Scalar rsub.Tensor": lambda a, b, alpha=1: b - alpha * a,
    "mul.Tensor mul.Scalar": operator.mul,
    "div.Tensor div.Scalar": jnp.true_divide,
    "div.Tensor_mode div.Scalar_mode": divided,
    "floor_divide.default floor_divide.Scalar": jnp.floor_divide,
    "remainder.Scalar remainder.Tensor": jnp.remainder,
    "fmod.Scalar fmod.Tensor": jnp.fmod,
    "pow.Tensor_Scalar pow.Tensor_Tensor": power,
    "pow.Scalar": jnp.power,
    "lerp.Scalar lerp.Tensor": lambda a, b, weight: a + weight * (b - a),
    "maximum.default": jnp.maximum,
    "minimum.default": jnp.minimum,
    "atan2.default": jnp.arctan2,
    "neg.default": operator.neg,
    "reciprocal.default": lambda x: 1 / x,
    "rsqrt.default": lambda x: 1 / jnp.sqrt(x),
    "relu.default": lambda x: jnp.maximum(x, 0),
    "sigmoid.default": nn.sigmoid,
    "silu.default": nn.silu,
    "gelu.default": gelu,
    "elu.default": elu,
    "leaky_relu.default": leaky,
    "softplus.default": softplus,
    "softplus_backward.default": softplus_backward,
    "elu_backward.default": elu_backward,
    "log_sigmoid_forward.default": lambda x: (nn.log_sigmoid(x), x),
    "log_sigmoid_backward.default": lambda slope, x, buffer: slope * nn.sigmoid(-x),
    "erf.default": jax.scipy.special.erf,
    "sgn.default sign.default": jnp.sign,
    "clamp.default clamp.Tensor": clamp,
    "clamp_min.default clamp_min.Tensor": lambda x, least: clamp(x, min=least),
    "clamp_max.default clamp_max.Tensor": lambda x, most: clamp(x, max=most),
    "square.default": jnp.square,
    "mm.default bmm.default mv.default dot.default matmul.default": matmul,
    "addmm.default baddbmm.default addmv.default": product_added(matmul),
    "sum.dim_IntList sum.default": reduced(jnp.sum),
    "mean.dim mean.default": reduced(jnp.mean),
    "prod.default prod.dim_int": reduced(jnp.prod),
    "amax.default": reduced(jnp.max),
    "amin.default": reduced(jnp.min),
    "max.default": jnp.max,
    "min.default": jnp.min,
    "max.dim": best(jnp.max, jnp.argmax),
    "min.dim": best(jnp.min, jnp.argmin),
    "argmax.default": positions(jnp.argmax),
    "argmin.default": positions(jnp.argmin),
    "any.default any.dim any.dims": reduced(jnp.any),
    "all.default all.dim all.dims": reduced(jnp.all),
    "var.correction": variance,
    "std.correction": lambda *args, **kwargs: jnp.sqrt(variance(*args, **kwargs)),
    "linalg_vector_norm.default": norm,
    "logsumexp.default": lambda x, dim, keepdim=False: nn.logsumexp(x, axis=axes(dim), keepdims=keepdim),
    "cumsum.default": cumulated(jnp.cumsum),
    "cumprod.default": cumulated(jnp.cumprod),
    "sort.default sort.stable": ordered,
    "topk.default": largest,
    "cat.default": lambda parts, dim=0: jnp.concatenate([p for p in parts if p.shape != (0,)], dim),
    "stack.default": lambda parts, dim=0: jnp.stack(parts, dim),
    "t.default": jnp.transpose,
    "transpose.int": jnp.swapaxes,
    "permute.default": jnp.transpose,
    "unsqueeze.default": jnp.expand_dims,
    "squeeze.dim squeeze.dims squeeze.default squeeze_.dim squeeze_.dims": squeezed,
    "select.int": selected,
    "slice.Tensor": sliced,
    "select_backward.default": select_backward,
    "slice_backward.default": slice_backward,
    "view.default _unsafe_view.default reshape.default": reshaped,
    "expand.default": expanded,
    "clone.default detach.default alias.default contiguous.default lift_fresh.default": same,
    "_to_copy.default": to,
    "split.Tensor split_with_sizes.default": split,
    "unbind.int": lambda x, dim=0: [selected(x, dim, i) for i in range(x.shape[dim])],
    "flip.default": jnp.flip,
    "roll.default": lambda x, shifts, dims=(): jnp.roll(x, shifts, tuple(dims) or None),
    "diagonal.default": jnp.diagonal,
    "diagonal_backward.default": diagonal_backward,
    "diag_embed.default": diagonal_matrix,
    "eye.default eye.m": identity,
    "linspace.default": spaced,
    "tril.default": triangle(jnp.tril),
    "triu.default": triangle(jnp.triu),
    "index.Tensor": lambda x, indices: x[by_indices(indices)],
    "index_put.default": index_put,
    "index_add.default": index_add,
    "index_select.default": lambda x, dim, index: jnp.take(x, index.reshape(-1), dim),
    "gather.default": gathered,
    "scatter.value scatter.src": scattered("set"),
    "scatter_add.default": scattered("add"),
    "masked_fill.Scalar masked_fill.Tensor": masked,
    "fill.Scalar fill.Tensor": jnp.full_like,
    "zero.default": jnp.zeros_like,
    "copy.default": lambda x, source, *rest: jnp.broadcast_to(source, x.shape),
    "where.self where.ScalarOther where.ScalarSelf where.Scalar": jnp.where,
    "gt.Scalar gt.Tensor": compared(operator.gt),
    "lt.Scalar lt.Tensor": compared(operator.lt),
    "ge.Scalar ge.Tensor": compared(operator.ge),
    "le.Scalar le.Tensor": compared(operator.le),
    "eq.Scalar eq.Tensor": compared(operator.eq),
    "ne.Scalar ne.Tensor": compared(operator.ne),
    "bitwise_and.Scalar bitwise_and.Tensor": operator.and_,
    "bitwise_or.Scalar bitwise_or.Tensor": operator.or_,
    "bitwise_xor.Scalar bitwise_xor.Tensor": operator.xor,
    "bitwise_not.default": jnp.bitwise_not,
    "bitwise_right_shift.Tensor_Scalar __rshift__.Scalar": shifted_right,
    "arange.default arange.start arange.start_step": arange,
    "zeros.default empty.memory_format": filled(0),
    "ones.default": filled(1),
    "full.default": full,
    "zeros_like.default empty_like.default": filled_like(0),
    "ones_like.default": filled_like(1),
    "full_like.default": lambda x, value, *, dtype=None, **rest: filled_like(value)(x, dtype=dtype),
    "new_zeros.default new_empty.default": new(0),
    "new_ones.default": new(1),
    "new_full.default": lambda x, size, value, **rest: new(value)(x, size, **rest),
    "scalar_tensor.default": lambda value, *, dtype=None, **rest: full((), value, dtype=dtype),
    "constant_pad_nd.default": padded,
    "convolution.default": convolution,
    "convolution_backward.default": convolution_backward,
    "threshold_backward.default": lambda slope, x, threshold: jnp.where(x <= threshold, 0, slope),
    "tanh_backward.default": lambda slope, out: slope * (1 - out * out),
    "sigmoid_backward.default": lambda slope, out: slope * out * (1 - out),
    "gelu_backward.default": backward(gelu),
    "silu_backward.default": backward(nn.silu),
    "leaky_relu_backward.default": lambda slope, x, a, result: jnp.where(x > 0, slope, a * slope),
    "_softmax.default": lambda x, dim, half: nn.softmax(x, axis=dim),
    "_log_softmax.default": lambda x, dim, half: nn.log_softmax(x, axis=dim),
    "_softmax_backward_data.default": softmax_backward,
    "_log_softmax_backward_data.default": log_softmax_backward,
    "embedding.default": lambda table, index, *rest: table[index],
    "embedding_dense_backward.default": embedding_backward,
    "_linalg_solve_ex.default": solved,
    "linalg_lu_solve.default": solved_again,
    "linalg_inv_ex.default": lambda a, *, check_errors=False: (jnp.linalg.inv(a), no_error(a)),
    "_linalg_check_errors.default": same,
    "linalg_cholesky_ex.default": cholesky,
    "linalg_solve_triangular.default": triangular,
}


SAME_NAME = (
    *("sqrt", "exp", "log", "log1p", "expm1", "sin", "cos", "tan", "tanh", "sinh", "cosh", "abs", "floor"),
    *("ceil", "trunc", "logical_and", "logical_or", "logical_not", "logical_xor", "isnan", "isfinite"),
)
BY_NAME |= {f"{name}.default": getattr(jnp, name) for name in SAME_NAME}


def translations() -> dict[Any, Operation]:
    """Return what each operation of ATen is in JAX."""
    found: dict[Any, Operation] = {operator.getitem: operator.getitem}
    for names, function in BY_NAME.items():
        for name in names.split():
            packet, _, overload = name.partition(".")
            operation = getattr(getattr(torch.ops.aten, packet, None), overload, None)
            if operation is not None:
                found[operation] = function
    return found
