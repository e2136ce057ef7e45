"""A backward pass of its own for a function that is differentiated in any way.

`jax.custom_vjp` would forbid forward mode, and take second derivatives of the
backward pass, which reads what is known instead of computing it. Here JAX sees
a linear map whose transpose is the cheap backward pass, and takes every other
derivative of the plain function.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from spectraformer_jax.linear_attention import leaves
from spectraformer_jax.typing import Array, PyTree

# (what it depends on, linear arguments) -> results.
LinearFn = Callable[[list[Array], list[Array]], list[Array]]


def with_backward(
  forward: Callable[..., tuple[PyTree, PyTree]],
  backward: Callable[[tuple, PyTree, PyTree], tuple],
  plain: Callable[..., PyTree],
) -> Callable[..., PyTree]:
  """A function that is computed by `forward` and transposed by `backward`.

  Args:
    forward: of the inputs, to the output and what the backward pass keeps.
    backward: of the inputs, what was kept and the gradient of the output (None
      for leaves that are not float), to gradients of the inputs, a tuple of
      the same structure.
    plain: the output as ordinary JAX, for forward mode and for derivatives of
      higher order.
  """

  @jax.custom_jvp
  def run(*inputs):
    return forward(*inputs)

  @functools.partial(run.defjvp, symbolic_zeros=True)
  def rule(inputs, tangents):
    out, kept = run(*inputs)
    tangents = jax.tree.leaves(tangents)
    is_zero = lambda t: isinstance(t, SymbolicZero)
    moves = [not is_zero(t) for t in tangents]
    depends, tree = jax.tree.flatten((inputs, out, kept))

    def split(depends):
      """Inputs, output, what was kept; and the inputs that move, a function."""
      inputs, out, kept = tree.unflatten(depends)
      flat, in_tree = jax.tree.flatten(inputs)
      moving = [x for x, moved in zip(flat, moves, strict=True) if moved]

      def of_moving(moving):
        new = iter(moving)
        merged = (
          next(new) if moved else x
          for x, moved in zip(flat, moves, strict=True)
        )
        return leaves.floats(plain(*in_tree.unflatten(merged)))

      return inputs, out, kept, moving, of_moving

    def push(depends, tangents):
      *_, moving, of_moving = split(depends)
      return jax.jvp(of_moving, (moving,), (tangents,))[1]

    def pull(depends, gradients):
      *_, moving, of_moving = split(depends)
      return jax.vjp(of_moving, moving)[1](gradients)[0]

    def cheap_pull(depends, gradients):
      inputs, out, kept, *_ = split(depends)
      gradient = leaves.with_floats(
        jax.tree.map(lambda x: x if leaves.is_float(x) else None, out),
        gradients,
      )
      pulled = backward(inputs, kept, gradient)
      pulled = jax.tree.structure(inputs).flatten_up_to(pulled)
      return [d for d, moved in zip(pulled, moves, strict=True) if moved]

    of_out = range(len(moves), len(moves) + len(jax.tree.leaves(out)))
    linear = _Linear(
      push,
      push,
      cheap_pull,
      pull,
      [place for place, moved in enumerate(moves) if moved],
      [place for place in of_out if leaves.is_float(depends[place])],
    )
    tangents = [t for t, moved in zip(tangents, moves, strict=True) if moved]
    tangents = iter(_linear_p.bind(*depends, *tangents, linear=linear))
    d_out = jax.tree.map(
      lambda x: next(tangents) if leaves.is_float(x) else _no_tangent(x), out
    )
    return (out, kept), (d_out, jax.tree.map(_no_tangent, kept))

  return lambda *inputs: run(*inputs)[0]


def _no_tangent(x: Array) -> SymbolicZero:
  """The tangent of what does not move, or is taken not to."""
  return SymbolicZero(jax.typeof(x).to_tangent_aval())


@dataclasses.dataclass(frozen=True, eq=False)
class _Linear:
  """A linear map and its transpose.

  Attributes:
    apply: the map as it is computed.
    exact: the same map, to be differentiated by what it depends on.
    apply_transposed: its transpose as it is computed.
    exact_transposed: its transpose, to be differentiated.
    arguments: which of the arrays that it depends on have the types of its
      linear arguments.
    results: and which have those of its results.
  """

  apply: LinearFn
  exact: LinearFn
  apply_transposed: LinearFn
  exact_transposed: LinearFn
  arguments: list[int]
  results: list[int]

  def parts(self, arrays: list) -> tuple[list, list]:
    """What it depends on, and its linear arguments."""
    count = len(arrays) - len(self.arguments)
    return arrays[:count], arrays[count:]

  def transposed(self) -> "_Linear":
    """Its transpose."""
    return _Linear(
      self.apply_transposed,
      self.exact_transposed,
      self.apply,
      self.exact,
      self.results,
      self.arguments,
    )

  def over(self, axes: list[int | None]) -> "_Linear":
    """The map of each of many, where what it depends on has these axes."""
    many = lambda function: jax.vmap(function, in_axes=(axes, 0))
    return _Linear(
      many(self.apply),
      many(self.exact),
      many(self.apply_transposed),
      many(self.exact_transposed),
      self.arguments,
      self.results,
    )


_linear_p = Primitive("linear_with_transpose")
_linear_p.multiple_results = True


@_linear_p.def_impl
def _compute(*arrays, linear: _Linear):
  return linear.apply(*linear.parts(list(arrays)))


mlir.register_lowering(_linear_p, mlir.lower_fun(_compute, True))


@_linear_p.def_abstract_eval
def _types(*types, linear: _Linear):
  return [types[place] for place in linear.results]


def _push_forward(arrays, tangents, *, linear: _Linear):
  """The derivative, by linear arguments and by what the map depends on."""
  depends, arguments = linear.parts(list(arrays))
  d_depends, d_arguments = linear.parts(list(tangents))
  is_zero = lambda tangent: isinstance(tangent, ad.Zero)
  total = None
  if not all(map(is_zero, d_arguments)):
    d_arguments = map(ad.instantiate_zeros, d_arguments)
    total = _linear_p.bind(*depends, *d_arguments, linear=linear)
  moves = [not is_zero(tangent) for tangent in d_depends]
  if any(moves):

    def of_moving(moving):
      new = iter(moving)
      merged = [
        next(new) if moved else x
        for x, moved in zip(depends, moves, strict=True)
      ]
      return linear.exact(merged, arguments)

    moving, d_moving = (
      [x for x, moved in zip(xs, moves, strict=True) if moved]
      for xs in (depends, d_depends)
    )
    more = jax.jvp(of_moving, (moving,), (d_moving,))[1]
    total = more if total is None else list(map(jnp.add, total, more))
  return _linear_p.bind(*arrays, linear=linear), total


ad.primitive_jvps[_linear_p] = _push_forward


def _pull_back(gradients, *arrays, linear: _Linear):
  """One application of the transpose."""
  depends, arguments = linear.parts(list(arrays))
  pulled = _linear_p.bind(
    *depends,
    *map(ad.instantiate_zeros, gradients),
    linear=linear.transposed(),
  )
  return [None] * len(depends) + [
    d if ad.is_undefined_primal(x) else None
    for x, d in zip(arguments, pulled, strict=True)
  ]


ad.primitive_transposes[_linear_p] = _pull_back


def _over_axis(arrays, axes, *, linear: _Linear):
  """Arrays whose types stand for others are mapped, the rest where they are."""
  (size,) = {
    x.shape[axis]
    for x, axis in zip(arrays, axes, strict=True)
    if axis is not None
  }
  depends, _ = linear.parts(list(arrays))
  mapped = {*linear.arguments, *linear.results}
  mapped.update(range(len(depends), len(arrays)))
  arrays, axes = list(arrays), list(axes)
  for place, (x, axis) in enumerate(zip(arrays, axes, strict=True)):
    if axis is not None:
      arrays[place], axes[place] = jnp.moveaxis(x, axis, 0), 0
    elif place in mapped:
      arrays[place], axes[place] = jnp.broadcast_to(x, (size, *x.shape)), 0
  linear = linear.over(axes[: len(depends)])
  outs = _linear_p.bind(*arrays, linear=linear)
  return outs, [0] * len(outs)


batching.primitive_batchers[_linear_p] = _over_axis
