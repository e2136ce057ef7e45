"""Functions with a hand-written backward pass and all other derivatives.

`jax.custom_vjp` would forbid forward mode, and its second derivatives would be
wrong: they would differentiate the backward pass, which reads saved results as
if they were constants. Here the derivative is a linear map whose transpose is
the backward pass, and JAX takes every other derivative from the exact function.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from spectraformer_jax.linear_attention import leaves
from spectraformer_jax.typing import Array, PyTree

# (residuals, linear arguments) -> results. Residuals are the arrays that the
# linear map depends on.
LinearFn = Callable[[list[Array], list[Array]], list[Array]]


def with_backward(
  forward: Callable[..., tuple[PyTree, PyTree]],
  backward: Callable[[tuple, PyTree, PyTree], tuple],
  exact: Callable[..., tuple[PyTree, PyTree]],
) -> Callable[..., Any]:
  """Returns the function of `forward`, with `backward` as its backward pass.

  Args:
    forward: takes the inputs; returns the output and what `backward` needs.
    backward: takes the inputs, what `forward` saved, and the gradient of the
      output (None for leaves that are not float); returns the gradients of the
      inputs, a tuple of the same structure.
    exact: does the same as `forward` in ordinary JAX. Forward mode and
      derivatives of higher order differentiate its output.
  """
  run = jax.custom_jvp(forward)

  def jvp(inputs: tuple, tangents: tuple) -> tuple[tuple, tuple]:
    out, saved = run(*inputs)
    flat_tangents, in_tree = jax.tree.flatten(tangents)
    # An input moves if its tangent is not known to be zero.
    moves = [not isinstance(t, SymbolicZero) for t in flat_tangents]
    residuals, tree = jax.tree.flatten((inputs, out, saved))

    def of_moving(residuals: list[Array]) -> tuple[Callable, list[Array]]:
      """Returns the exact output as a function of moving inputs, and these."""
      flat = jax.tree.leaves(tree.unflatten(residuals)[0])

      def function(moving: list[Array]) -> list[Array]:
        merged = in_tree.unflatten(_merge(flat, moves, moving))
        return leaves.floats(exact(*merged)[0])

      return function, _select(flat, moves)

    def push(residuals: list[Array], tangents: list[Array]) -> list[Array]:
      function, moving = of_moving(residuals)
      return jax.jvp(function, (moving,), (tangents,))[1]

    def pull(residuals: list[Array], gradients: list[Array]) -> list[Array]:
      function, moving = of_moving(residuals)
      return jax.vjp(function, moving)[1](gradients)[0]

    def fast_pull(
      residuals: list[Array], gradients: list[Array]
    ) -> list[Array]:
      inputs, out, saved = tree.unflatten(residuals)
      gradient = leaves.only_floats(out, gradients)
      pulled = backward(inputs, saved, gradient)
      pulled = jax.tree.structure(inputs).flatten_up_to(pulled)
      return _select(pulled, moves)

    first = len(moves)
    of_out = range(first, first + len(jax.tree.leaves(out)))
    linear = _Linear(
      apply=push,
      exact=push,
      apply_transposed=fast_pull,
      exact_transposed=pull,
      arguments=[place for place, is_moving in enumerate(moves) if is_moving],
      results=[place for place in of_out if leaves.is_float(residuals[place])],
    )
    moving = _select(flat_tangents, moves)
    pushed = iter(_linear_p.bind(*residuals, *moving, linear=linear))
    d_out = jax.tree.map(
      lambda x: next(pushed) if leaves.is_float(x) else _no_tangent(x), out
    )
    return (out, saved), (d_out, jax.tree.map(_no_tangent, saved))

  run.defjvp(jvp, symbolic_zeros=True)
  return lambda *inputs: run(*inputs)[0]


def _no_tangent(x: Array) -> SymbolicZero:
  """Returns the zero tangent, that of an array that does not move."""
  return SymbolicZero(jax.typeof(x).to_tangent_aval())


def _select(values: Sequence, wanted: list[bool]) -> list:
  """Returns the wanted values."""
  return [x for x, is_wanted in zip(values, wanted, strict=True) if is_wanted]


def _merge(values: Sequence, wanted: list[bool], new: list) -> list:
  """Returns all values, the wanted ones replaced by new ones."""
  rest = iter(new)
  return [
    next(rest) if is_wanted else x
    for x, is_wanted in zip(values, wanted, strict=True)
  ]


@dataclasses.dataclass(frozen=True, eq=False)
class _Linear:
  """A linear map and its transpose.

  Attributes:
    apply: the map as it is computed.
    exact: the same map, differentiable by its residuals.
    apply_transposed: its transpose as it is computed.
    exact_transposed: its transpose, differentiable likewise.
    arguments: for each linear argument, the place of an array of the same type
      among the residuals.
    results: for each result, the place of such an array.
  """

  apply: LinearFn
  exact: LinearFn
  apply_transposed: LinearFn
  exact_transposed: LinearFn
  arguments: list[int]
  results: list[int]

  def parts(self, arrays: Sequence) -> tuple[list, list]:
    """Splits into residuals and linear arguments."""
    count = len(arrays) - len(self.arguments)
    return list(arrays[:count]), list(arrays[count:])

  def transposed(self) -> "_Linear":
    """Returns its transpose."""
    return _Linear(
      self.apply_transposed,
      self.exact_transposed,
      self.apply,
      self.exact,
      self.results,
      self.arguments,
    )

  def over(self, axes: list[int | None]) -> "_Linear":
    """Returns the map over a batch, given the batch axes of its arrays."""
    batched = lambda function: jax.vmap(function, in_axes=(axes, 0))
    return _Linear(
      batched(self.apply),
      batched(self.exact),
      batched(self.apply_transposed),
      batched(self.exact_transposed),
      self.arguments,
      self.results,
    )


_linear_p = Primitive("linear_with_transpose")
_linear_p.multiple_results = True


@_linear_p.def_impl
def _compute(*arrays: Array, linear: _Linear) -> list[Array]:
  return linear.apply(*linear.parts(arrays))


mlir.register_lowering(_linear_p, mlir.lower_fun(_compute, True))


@_linear_p.def_abstract_eval
def _types(*types: Any, linear: _Linear) -> list:
  return [types[place] for place in linear.results]


def _push_forward(
  arrays: Sequence, tangents: Sequence, *, linear: _Linear
) -> tuple[list[Array], list[Array] | None]:
  """Differentiates by linear arguments and by residuals."""
  residuals, arguments = linear.parts(arrays)
  d_residuals, d_arguments = linear.parts(tangents)
  moves = [not isinstance(tangent, ad.Zero) for tangent in d_residuals]
  total = None
  if not all(isinstance(tangent, ad.Zero) for tangent in d_arguments):
    d_arguments = map(ad.instantiate_zeros, d_arguments)
    total = _linear_p.bind(*residuals, *d_arguments, linear=linear)
  if any(moves):

    def of_moving(moving: list[Array]) -> list[Array]:
      return linear.exact(_merge(residuals, moves, moving), arguments)

    moving, d_moving = _select(residuals, moves), _select(d_residuals, moves)
    more = jax.jvp(of_moving, (moving,), (d_moving,))[1]
    total = more if total is None else list(map(jnp.add, total, more))
  return _linear_p.bind(*arrays, linear=linear), total


ad.primitive_jvps[_linear_p] = _push_forward


def _pull_back(
  gradients: Sequence, *arrays: Any, linear: _Linear
) -> list[Array | None]:
  """Applies the transpose of the map to gradients of its results."""
  residuals, arguments = linear.parts(arrays)
  pulled = _linear_p.bind(
    *residuals,
    *map(ad.instantiate_zeros, gradients),
    linear=linear.transposed(),
  )
  return [
    *(None for _ in residuals),
    *(
      d if ad.is_undefined_primal(x) else None
      for x, d in zip(arguments, pulled, strict=True)
    ),
  ]


ad.primitive_transposes[_linear_p] = _pull_back


def _over_axis(
  arrays: Sequence[Array], axes: Sequence[int | None], *, linear: _Linear
) -> tuple[list[Array], list[int]]:
  """Batches the map.

  Linear arguments, and the arrays that give the types of arguments and results,
  always get a batch axis. Other arrays have one only if they came with it.
  """
  (size,) = {
    x.shape[axis]
    for x, axis in zip(arrays, axes, strict=True)
    if axis is not None
  }
  residuals, _ = linear.parts(arrays)
  batched = {*linear.arguments, *linear.results}
  batched.update(range(len(residuals), len(arrays)))
  arrays, axes = list(arrays), list(axes)
  for place, (x, axis) in enumerate(zip(arrays, axes, strict=True)):
    if axis is not None:
      arrays[place], axes[place] = jnp.moveaxis(x, axis, 0), 0
    elif place in batched:
      arrays[place], axes[place] = jnp.broadcast_to(x, (size, *x.shape)), 0
  linear = linear.over(axes[: len(residuals)])
  outs = _linear_p.bind(*arrays, linear=linear)
  return outs, [0] * len(outs)


batching.primitive_batchers[_linear_p] = _over_axis
