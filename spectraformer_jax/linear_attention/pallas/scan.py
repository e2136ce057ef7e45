"""A scan over the chunks of each head, with one kernel for each direction.

The backward kernel differentiates the body of the scan at each chunk, from the
carry that the chunk had.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.typing import Array, PyTree

# (constants, carry, chunks of xs, mask [C, 1] or None) -> carry, chunks of ys.
# All arrays have two axes and belong to one head.
Step = Callable[
  [list[Array], PyTree, list[Array], Array | None], tuple[PyTree, list[Array]]
]

# Names of the primitives that kernels of both platforms can use. Other
# elementary functions may lower as well; they have not been tried.
PRIMITIVES = frozenset(
  (
    "add broadcast_in_dim convert_element_type dot_general exp mul neg "
    "reduce_sum square squeeze sub"
  ).split()
)

# The smallest chunk that all units of both platforms take.
SMALLEST_CHUNK = 16


# An array, a ref of one in a kernel, its shape and dtype, or its block spec:
# the records below hold trees of each.
Leaf = Any


class Sizes(NamedTuple):
  """The sizes that decide whether the tiles of a kernel fit on chip.

  Attributes:
    length: the larger of T and S.
    head_dim: H.
    value_dim: V.
    feature_dim: F.
    constants: shapes ``[R, K]`` of float32 arrays that a kernel keeps on chip.
    item_bytes: of a number in query, key and value.
    is_causal: whether one kernel reads both queries and keys.
  """

  length: int
  head_dim: int
  value_dim: int
  feature_dim: int
  constants: list[tuple[int, ...]]
  item_bytes: int
  is_causal: bool


class Tile(NamedTuple):
  """What a kernel works on at once.

  Attributes:
    chunk_size: positions, C.
    value_dim: V, or the size of equal parts of it.
  """

  chunk_size: int
  value_dim: int


class ForwardInputs(NamedTuple):
  """What the forward kernel reads.

  Attributes:
    constants: ``[B or 1, N or 1, R, K]`` float32, the same for all chunks.
    carry: the carry before the first chunk; leaves ``[B, N, R, K]`` float32.
    xs: ``[B, N, T, K]``, T a multiple of the chunk size.
    mask: ``[B, 1, T]`` float32 of 0 and 1, or None.
  """

  constants: list[Leaf]
  carry: PyTree
  xs: list[Leaf]
  mask: Leaf | None


class ForwardOutputs(NamedTuple):
  """What the forward kernel writes.

  Attributes:
    last: the carry after the last chunk.
    ys: ``[B, N, T, K]``.
    saved: the carry before each chunk, leaves ``[B, N, T / C, R, K]``; [] where
      none is saved.
  """

  last: PyTree
  ys: list[Leaf]
  saved: PyTree


class BackwardInputs(NamedTuple):
  """What the backward kernel reads.

  Attributes:
    constants: see `ForwardInputs`.
    saved: see `ForwardOutputs`; leaves ``[B, N, R, K]`` are the same for all
      chunks.
    xs: see `ForwardInputs`.
    mask: see `ForwardInputs`.
    d_last: the gradient of the last carry.
    d_ys: the gradient of ys.
  """

  constants: list[Leaf]
  saved: PyTree
  xs: list[Leaf]
  mask: Leaf | None
  d_last: PyTree
  d_ys: list[Leaf]


class BackwardOutputs(NamedTuple):
  """What the backward kernel writes.

  Attributes:
    d_constants: gradients of the wanted constants, ``[B, N, R, K]``.
    d_carry: the gradient of the first carry.
    d_xs: gradients of xs.
  """

  d_constants: list[Leaf]
  d_carry: PyTree
  d_xs: list[Leaf]


@dataclasses.dataclass(frozen=True)
class Calls:
  """The two kernels of a step; each platform has a subclass.

  Attributes:
    step: the work on one chunk.
    chunk_size: positions of a chunk, C.
    interpret: see `pl.pallas_call`.
  """

  step: Step
  chunk_size: int
  interpret: Any = False

  def forward(self, inputs: ForwardInputs, *, saves: bool) -> ForwardOutputs:
    """Runs the step over all chunks, and saves the carries if `saves`."""
    raise NotImplementedError

  def backward(
    self, inputs: BackwardInputs, wanted: list[bool]
  ) -> BackwardOutputs:
    """Computes the gradients of the wanted constants, of carry and of xs."""
    raise NotImplementedError

  def forward_shapes(
    self, inputs: ForwardInputs, saves: bool
  ) -> ForwardOutputs:
    """Returns shapes and dtypes of what `forward` returns."""
    constants, carry, xs, mask = inputs
    batch, heads, length, _ = xs[0].shape
    shape = jax.ShapeDtypeStruct
    in_chunk = lambda a: shape((self.chunk_size, a.shape[3]), a.dtype)
    _, ys = jax.eval_shape(
      self.step,
      *jax.tree.map(lambda a: shape(a.shape[2:], a.dtype), (constants, carry)),
      jax.tree.map(in_chunk, xs),
      None if mask is None else shape((self.chunk_size, 1), jnp.bool_),
    )
    ys = [shape((batch, heads, length, y.shape[1]), y.dtype) for y in ys]
    lead = batch, heads, length // self.chunk_size
    saved = jax.tree.map(
      lambda a: shape((*lead, *a.shape[2:]), a.dtype), carry if saves else []
    )
    return ForwardOutputs(carry, ys, saved)

  def pull_back(
    self, inputs: BackwardInputs, wanted: list[bool]
  ) -> BackwardOutputs:
    """Differentiates the step at one chunk of one head."""

    def of_wanted(
      floats: list[Array], carry: PyTree, xs: list[Array]
    ) -> tuple[PyTree, list[Array]]:
      new = iter(floats)
      constants = [
        next(new) if is_wanted else constant
        for is_wanted, constant in zip(wanted, inputs.constants, strict=True)
      ]
      return self.step(constants, carry, xs, inputs.mask)

    floats = select(inputs.constants, wanted)
    _, pull = jax.vjp(of_wanted, floats, inputs.saved, inputs.xs)
    return BackwardOutputs(*pull((inputs.d_last, inputs.d_ys)))


def backward_shapes(
  inputs: BackwardInputs, wanted: list[bool]
) -> BackwardOutputs:
  """Returns shapes and dtypes of what `Calls.backward` returns."""
  lead = inputs.xs[0].shape[:2]
  d_constants = [
    jax.ShapeDtypeStruct((*lead, *a.shape[2:]), a.dtype)
    for a in select(inputs.constants, wanted)
  ]
  return BackwardOutputs(d_constants, inputs.d_last, inputs.xs)


def scan(
  calls: Calls, inputs: ForwardInputs, *, is_linear: bool
) -> tuple[PyTree, list[Array]]:
  """Runs a step over chunks, one example and head at a time.

  Gradients flow to constants, carry and xs. Those of constants that are not
  differentiated (a projection that is not learned) are not computed.

  Args:
    calls: the kernels.
    inputs: see `ForwardInputs`.
    is_linear: whether the gradient of a chunk is the same at the last carry as
      at the carry that the chunk had. Then no carry is saved, and the first
      carry takes no gradient.

  Returns:
    The last carry, and ys ``[B, N, T, K]``.
  """

  @jax.custom_vjp
  def run(
    constants: list[Array], carry: PyTree, xs: list[Array], mask: Array | None
  ) -> tuple[PyTree, list[Array]]:
    inputs = ForwardInputs(constants, carry, xs, mask)
    return calls.forward(inputs, saves=False)[:2]

  def forward(*primals: PyTree) -> tuple[tuple[PyTree, list[Array]], tuple]:
    inputs = ForwardInputs(*jax.tree.map(lambda primal: primal.value, primals))
    last, ys, saved = calls.forward(inputs, saves=not is_linear)
    # Which constants are wanted is static, so the tree must hold it without a
    # leaf: neither () nor None has one.
    wanted = [() if primal.perturbed else None for primal in primals[0]]
    saved = last if is_linear else saved
    return (last, ys), (inputs.constants, wanted, saved, inputs.xs, inputs.mask)

  def backward(
    residuals: tuple, gradients: tuple[PyTree, list[Array]]
  ) -> tuple[list[Array | None], PyTree, list[Array], None]:
    constants, wanted, saved, xs, mask = residuals
    wanted = [w is not None for w in wanted]
    d_last, d_ys = _instantiate(gradients)
    if d_ys:
      # Queries whose outputs are not used, such as padding, may hold anything.
      unused = jnp.all(d_ys[0] == 0.0, axis=-1, keepdims=True)
      xs = [jnp.where(unused, 0, xs[0]), *xs[1:]]
    d_wanted, d_carry, d_xs = calls.backward(
      BackwardInputs(constants, saved, xs, mask, d_last, d_ys), wanted
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
  return run(*inputs)


def call_on_trees(
  call: Callable,
  kernel: Callable[[PyTree, PyTree], None],
  inputs: PyTree,
  in_specs: PyTree,
  outputs: PyTree,
  out_specs: PyTree,
) -> PyTree:
  """Calls a kernel that takes one tree of inputs and one of outputs.

  Args:
    call: `pl.pallas_call` with all other arguments.
    kernel: takes the two trees of refs.
    inputs: a tree of arrays.
    in_specs: the tree of their block specs.
    outputs: a tree of shapes and dtypes.
    out_specs: the tree of their block specs.
  """
  inputs, in_tree = jax.tree.flatten(inputs)
  outputs, out_tree = jax.tree.flatten(outputs)

  def flat_kernel(*refs: Array) -> None:
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
  """Reads the blocks of a tree of refs."""
  return jax.tree.map(lambda ref: ref[...], refs)


def write(refs: PyTree, values: PyTree, index: Any = ...) -> None:
  """Writes whole blocks, or entry `index` of each."""
  for ref, value in zip(
    jax.tree.leaves(refs), jax.tree.leaves(values), strict=True
  ):
    ref[index] = value


def select(values: list[Leaf], wanted: list[bool]) -> list[Leaf]:
  """Returns the wanted values."""
  return [x for x, is_wanted in zip(values, wanted, strict=True) if is_wanted]


def _instantiate(gradients: PyTree) -> PyTree:
  """Replaces symbolic zeros by arrays."""
  is_zero = lambda d: isinstance(d, jax.custom_derivatives.SymbolicZero)
  return jax.tree.map(
    lambda d: jnp.zeros(d.shape, d.dtype) if is_zero(d) else d,
    gradients,
    is_leaf=is_zero,
  )


def _sum_shared(gradient: Array, like: Array) -> Array:
  """Sums the gradient over examples or heads that share a constant."""
  axes = [axis for axis in (0, 1) if like.shape[axis] < gradient.shape[axis]]
  return jnp.sum(gradient, axis=axes, keepdims=True)
