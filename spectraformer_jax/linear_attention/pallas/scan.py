"""A scan over the chunks of each head whose two directions are kernels.

The gradient of a chunk is taken by differentiating its body inside the backward
kernel, from the carry that the chunk has seen.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import Array, PyTree

# (constants, carry, chunks of xs, mask [C, 1] or None) -> carry, chunks of ys;
# arrays of two axes, of one head.
Step = Callable[[list, PyTree, list, Array | None], tuple[PyTree, list]]

# What both platforms can do for each token. Elementary functions beyond these
# may lower as well; they have not been tried.
PRIMITIVES = frozenset(
  (
    "add broadcast_in_dim convert_element_type dot_general exp mul neg "
    "reduce_sum square squeeze sub"
  ).split()
)


# The least that all units of both platforms take.
SMALLEST_CHUNK = 16


class Sizes(NamedTuple):
  """What decides whether the tiles of a kernel fit on chip.

  Attributes:
    length: the larger of T and S.
    head_dim: H.
    value_dim: V.
    feature_dim: F.
    constants: shapes ``[R, K]`` of what a kernel keeps on chip, float32.
    item_bytes: of a number in query, key and value.
    is_causal: one kernel for queries and keys.
  """

  length: int
  head_dim: int
  value_dim: int
  feature_dim: int
  constants: list[tuple[int, int]]
  item_bytes: int
  is_causal: bool


class Tile(NamedTuple):
  """What a kernel works on at a time: C positions, V or fewer values."""

  chunk: int
  value_dim: int


class Calls(Protocol):
  """The two kernels of a step, on one platform."""

  def forward(
    self,
    constants: list[Array],
    carry: PyTree,
    xs: list[Array],
    mask: Array | None,
    *,
    keeps: bool,
  ) -> tuple[PyTree, list[Array], PyTree]:
    """The last carry, ys, and, if it `keeps`, the carry before each chunk.

    That of chunk c is ``[:, :, c]`` of leaves ``[B, N, T / C, R, K]``.
    """

  def backward(
    self,
    constants: list[Array],
    wanted: list[bool],
    kept: PyTree,
    xs: list[Array],
    mask: Array | None,
    d_last: PyTree,
    d_ys: list[Array],
  ) -> tuple[list[Array], PyTree, list[Array]]:
    """Gradients: of the wanted constants ``[B, N, R, K]``, of carry and xs.

    A `kept` with leaves ``[B, N, R, K]`` is the same for all chunks.
    """


def scan(
  calls: Calls,
  constants: Sequence[Array],
  carry: PyTree,
  xs: Sequence[Array],
  mask: Array | None,
  *,
  is_linear: bool,
) -> tuple[PyTree, list[Array]]:
  """Runs a step over chunks, one example and head at a time.

  Gradients flow to constants, carry and xs; those of constants that nobody
  asks for (a projection that is not learnt) are not computed.

  Args:
    calls: the kernels.
    constants: ``[B or 1, N or 1, R, K]`` float32, the same for all chunks.
    carry: leaves ``[B, N, R, K]`` float32.
    xs: ``[B, N, T, K]``, T a multiple of the chunk size.
    mask: ``[B, 1, T]`` float32 of 0 and 1, or None.
    is_linear: the gradient of a chunk is the same at the last carry as at the
      one it has seen, so that none is kept. The first carry is then a constant:
      it takes no gradient.

  Returns:
    The last carry, and ys ``[B, N, T, K]``.
  """

  @jax.custom_vjp
  def run(constants, carry, xs, mask):
    return calls.forward(constants, carry, xs, mask, keeps=False)[:2]

  def forward(*primals):
    inputs = jax.tree.map(lambda primal: primal.value, primals)
    last, ys, kept = calls.forward(*inputs, keeps=not is_linear)
    constants, _, xs, mask = inputs
    # What is wanted is static, so it must not be a leaf: None is none.
    wanted = [() if primal.perturbed else None for primal in primals[0]]
    residuals = constants, wanted, last if is_linear else kept, xs, mask
    return (last, ys), residuals

  def backward(residuals, gradients):
    constants, wanted, kept, xs, mask = residuals
    wanted = [w is not None for w in wanted]
    d_last, d_ys = _instantiate(gradients)
    if d_ys:
      # Queries whose outputs nobody uses, padding among them, hold anything.
      unused = jnp.all(d_ys[0] == 0.0, axis=-1, keepdims=True)
      xs = [jnp.where(unused, 0, xs[0]), *xs[1:]]
    d_wanted, d_carry, d_xs = calls.backward(
      constants, wanted, kept, xs, mask, d_last, d_ys
    )
    d_wanted = iter(d_wanted)
    d_constants = [
      _sum_shared(next(d_wanted), like) if is_wanted else None
      for is_wanted, like in zip(wanted, constants, strict=True)
    ]
    if is_linear:
      d_carry = jax.tree.map(jnp.zeros_like, d_carry)
    return d_constants, d_carry, d_xs, None

  run.defvjp(forward, backward, symbolic_zeros=True)
  return run(list(constants), carry, list(xs), mask)


def pull_back(
  step: Step, constants, wanted: list[bool], carry, xs, keep, gradients
) -> tuple[list[Array], PyTree, list[Array]]:
  """Gradients of one chunk for wanted constants, carry and xs."""

  def of_wanted(floats, carry, xs):
    new = iter(floats)
    merged = [
      next(new) if is_wanted else constant
      for is_wanted, constant in zip(wanted, constants, strict=True)
    ]
    return step(merged, carry, xs, keep)

  floats = [
    c for c, is_wanted in zip(constants, wanted, strict=True) if is_wanted
  ]
  return jax.vjp(of_wanted, floats, carry, xs)[1](gradients)


def outputs_of_forward(step: Step, chunk: int, inputs, *, keeps: bool):
  """Shapes of the last carry, ys, and the carries kept.

  Args:
    step: the work on one chunk.
    chunk: C.
    inputs: constants, carry, xs and mask, as in `scan`.
    keeps: whether there is one carry for each chunk.
  """
  constants, carry, xs, mask = inputs
  batch, heads, length, _ = xs[0].shape
  two_axes = lambda a: jax.ShapeDtypeStruct(a.shape[2:], a.dtype)
  of_chunk = lambda a: jax.ShapeDtypeStruct((chunk, a.shape[3]), a.dtype)
  keep = None
  if mask is not None:
    keep = jax.ShapeDtypeStruct((chunk, 1), jnp.bool_)
  _, ys = jax.eval_shape(
    step,
    *jax.tree.map(two_axes, (constants, carry)),
    jax.tree.map(of_chunk, xs),
    keep,
  )
  ys = [
    jax.ShapeDtypeStruct((batch, heads, length, y.shape[1]), y.dtype)
    for y in ys
  ]
  kept = jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(
      (batch, heads, length // chunk, *a.shape[2:]), a.dtype
    ),
    carry if keeps else [],
  )
  return carry, ys, kept


def outputs_of_backward(constants, wanted: list[bool], d_last, xs):
  """Shapes of the gradients of wanted constants, carry and xs."""
  lead = xs[0].shape[:2]
  d_constants = [
    jax.ShapeDtypeStruct((*lead, *a.shape[2:]), a.dtype)
    for a, is_wanted in zip(constants, wanted, strict=True)
    if is_wanted
  ]
  return d_constants, d_last, xs


def call_on_trees(call: Callable, kernel, inputs, in_specs, outputs, out_specs):
  """`pl.pallas_call` where a kernel takes a tree of inputs and one of outputs.

  Args:
    call: `pl.pallas_call` with all other arguments.
    kernel: of the two trees of refs.
    inputs: a tree of arrays.
    in_specs: that tree, of block specs.
    outputs: a tree of shapes and dtypes.
    out_specs: that tree, of block specs.
  """
  inputs, in_tree = jax.tree.flatten(inputs)
  outputs, out_tree = jax.tree.flatten(outputs)

  def flat_kernel(*refs):
    kernel(
      in_tree.unflatten(refs[: len(inputs)]),
      out_tree.unflatten(refs[len(inputs) :]),
    )

  outs = call(
    flat_kernel,
    in_specs=jax.tree.leaves(in_specs),
    out_specs=jax.tree.leaves(out_specs),
    out_shape=[jax.ShapeDtypeStruct(a.shape, a.dtype) for a in outputs],
  )(*inputs)
  return out_tree.unflatten(outs)


def read(refs: PyTree) -> PyTree:
  """The blocks of a tree of refs."""
  return jax.tree.map(lambda ref: ref[...], refs)


def write(refs: PyTree, values: PyTree, index=...) -> None:
  """Writes the blocks, or entry `index` of them."""
  for ref, value in zip(
    jax.tree.leaves(refs), jax.tree.leaves(values), strict=True
  ):
    ref[index] = value


def _instantiate(gradients: PyTree) -> PyTree:
  """Zeros where a gradient is known to be zero."""
  is_zero = lambda d: isinstance(d, jax.custom_derivatives.SymbolicZero)
  return jax.tree.map(
    lambda d: jnp.zeros(d.shape, d.dtype) if is_zero(d) else d,
    gradients,
    is_leaf=is_zero,
  )


def _sum_shared(gradient: Array, like: Array) -> Array:
  """The gradient of what examples or heads share."""
  axes = [axis for axis in (0, 1) if like.shape[axis] < gradient.shape[axis]]
  return jnp.sum(gradient, axis=axes, keepdims=True)
