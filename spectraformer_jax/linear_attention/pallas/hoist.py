"""Splits a feature map into what depends on tokens and what does not.

A Pallas kernel should compute what differs from token to token. It can do
little else: no decompositions, no reshapes of odd shapes. So the map is traced
once and cut where the token enters. The part before the cut runs in plain XLA,
with its gradients; its results are arrays that the kernel keeps on chip.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var

from spectraformer_jax.linear_attention.inputs import Maps
from spectraformer_jax.typing import Array, PyTree


class PerToken(NamedTuple):
  """The part of a feature map that depends on tokens.

  Attributes:
    function: takes some constants of one head and tokens ``[C, H]``; returns
      log-features ``[C, F]``.
    uses: the places of these constants in `Hoisted.constants`, in the order of
      the function's arguments.
  """

  function: ClosedJaxpr
  uses: list[int]

  def __call__(self, constants: Sequence[Array], x: Array) -> Array:
    """Returns log-features ``[C, F]`` of x ``[C, H]``; constants ``[R, K]``."""
    shapes = [aval.shape for aval in self.function.in_avals[:-1]]
    arguments = [
      jnp.reshape(constants[use], shape)
      for use, shape in zip(self.uses, shapes, strict=True)
    ]
    return jax.extend.core.jaxpr_as_fun(self.function)(*arguments, x)[0]


class Hoisted(NamedTuple):
  """The feature maps of queries and keys, each cut in two.

  Attributes:
    constants: results of the first part of both maps,
      ``[B or 1, N or 1, R, K]`` float32.
    query: the second part for queries.
    key: the second part for keys.
  """

  constants: list[Array]
  query: PerToken
  key: PerToken


def hoist(
  maps: Maps,
  constants: PyTree,
  query: jax.ShapeDtypeStruct,
  key: jax.ShapeDtypeStruct,
) -> Hoisted | str:
  """Cuts feature maps where the tokens enter.

  Args:
    maps: feature maps that return log-magnitudes alone.
    constants: variables of the maps; leaves lead with ``[B or 1, N or 1]``.
    query: shape and dtype of a chunk, ``[C, H]``.
    key: the same for keys.

  Returns:
    The two parts, or in words why the maps cannot be cut.
  """
  leaves, tree = jax.tree.flatten(constants)

  def of_one_head(
    leaves: list[Array], query: Array, key: Array, position: Array
  ) -> list[Array]:
    constants = tree.unflatten([leaf[None, None] for leaf in leaves])
    logs = (
      feature_map(constants, x[None, None], position).log_magnitude
      for feature_map, x in zip(maps, (query, key), strict=True)
    )
    return [jnp.squeeze(log, (0, 1)) for log in logs if log is not None]

  one_head = [jax.ShapeDtypeStruct(a.shape[2:], a.dtype) for a in leaves]
  traced = jax.make_jaxpr(of_one_head)(one_head, query, key, jnp.int32(0))
  *inputs, query_var, key_var, position = traced.jaxpr.invars
  # For each variable known without tokens: does it differ between examples,
  # and between heads?
  differs: dict[Any, tuple[bool, bool]] = {
    var: (False, False) for var in traced.jaxpr.constvars
  }
  for var, leaf in zip(inputs, leaves, strict=True):
    differs[var] = leaf.shape[0] > 1, leaf.shape[1] > 1
  before, after, free = [], [], set()
  for equation in traced.eqns:
    used = _variables(equation.invars)
    if free.issuperset(used):
      # Its result needs no input (zeros, for example): it is cheaper to make on
      # chip than to load.
      before.append(equation)
      after.append(equation)
      free.update(equation.outvars)
    elif all(var in differs or var in free for var in used):
      before.append(equation)
      known = [differs[var] for var in used if var in differs]
      examples, heads = (any(axis) for axis in zip(*known, strict=True))
      for var in equation.outvars:
        differs[var] = examples, heads
    else:
      after.append(equation)
  outputs = traced.jaxpr.outvars
  after = _needed(after, outputs)
  used = _variables(atom for equation in after for atom in equation.invars)
  if position in used:
    return "its features depend on positions"
  wanted: list[Any] = [var for var in dict.fromkeys(used) if var in differs]
  for var in wanted:
    if var.aval.dtype != jnp.float32 or len(var.aval.shape) > 2:
      return f"it needs a constant of type {var.aval.str_short()} on chip"
  first = _first_equal(before)
  unique: list[Any] = list(dict.fromkeys(first.get(v, v) for v in wanted))
  known = _function(
    traced.jaxpr, before, [*inputs, *traced.jaxpr.constvars], unique
  )
  values = _over_leading_axes(
    lambda *leaves: jax.extend.core.jaxpr_as_fun(known)(
      *leaves, *traced.consts
    ),
    leaves,
    [differs[var] for var in unique],
  )
  values = [
    jnp.reshape(value, (*value.shape[:2], *_two_axes(var.aval.shape)))
    for var, value in zip(unique, values, strict=True)
  ]

  def per_token(token: Var, output: Var) -> PerToken:
    equations = _needed(after, [output])
    used = {v for equation in equations for v in _variables(equation.invars)}
    own = [var for var in wanted if var in used]
    return PerToken(
      _function(traced.jaxpr, equations, [*own, token], [output]),
      [unique.index(first.get(var, var)) for var in own],
    )

  return Hoisted(
    values, per_token(query_var, outputs[0]), per_token(key_var, outputs[1])
  )


def primitives(equations: Sequence[JaxprEqn]) -> set[str]:
  """Returns the names of all primitives, inner functions included."""
  names = set()
  for equation in equations:
    inner = list(jax.extend.core.jaxprs_in_params(equation.params))
    for jaxpr in inner:
      names |= primitives(jaxpr.eqns)
    if not inner:
      names.add(equation.primitive.name)
  return names


def _variables(atoms: Iterable[Any]) -> list[Var]:
  """Returns the atoms that are not literals."""
  return [a for a in atoms if not isinstance(a, jax.extend.core.Literal)]


def _needed(
  equations: Sequence[JaxprEqn], outputs: Sequence[Any]
) -> list[JaxprEqn]:
  """Returns the equations that the outputs depend on."""
  wanted, needed = set(_variables(outputs)), []
  for equation in reversed(equations):
    if wanted.intersection(equation.outvars):
      wanted.update(_variables(equation.invars))
      needed.append(equation)
  return needed[::-1]


def _first_equal(equations: Sequence[JaxprEqn]) -> dict[Var, Var]:
  """Maps each result that equals an earlier one to the first such result."""
  first, results = {}, {}
  for equation in equations:
    if any(jax.extend.core.jaxprs_in_params(equation.params)):
      continue
    inputs = (
      first.get(a, a) if isinstance(a, Var) else repr(a)
      for a in equation.invars
    )
    signature = equation.primitive, tuple(inputs), repr(equation.params)
    same = results.setdefault(signature, equation.outvars)
    if same is not equation.outvars:
      first.update(zip(equation.outvars, same, strict=True))
  return first


def _function(
  jaxpr: Jaxpr,
  equations: Sequence[JaxprEqn],
  inputs: Sequence[Var],
  outputs: Sequence[Any],
) -> ClosedJaxpr:
  """Returns some equations of a jaxpr as a function."""
  part = jaxpr.replace(
    constvars=[], invars=inputs, outvars=outputs, eqns=equations
  )
  return ClosedJaxpr(part, [])


def _over_leading_axes(
  function: Callable[..., list[Array]],
  leaves: Sequence[Array],
  differs: Sequence[tuple[bool, bool]],
) -> list[Array]:
  """Maps over ``[B or 1, N or 1]``; shared results have axes of size 1 there.

  Args:
    function: takes leaves without leading axes, returns a list.
    leaves: with leading axes.
    differs: for each result, whether it differs along the two axes.
  """
  for axis in (1, 0):
    mapped = [leaf.shape[axis] > 1 for leaf in leaves]
    if any(mapped):
      function = jax.vmap(
        function,
        in_axes=[0 if m else None for m in mapped],
        out_axes=[0 if d[axis] else None for d in differs],
      )
  leaves = [
    jnp.squeeze(leaf, [axis for axis in (0, 1) if leaf.shape[axis] == 1])
    for leaf in leaves
  ]
  return [
    jnp.expand_dims(value, [axis for axis in (0, 1) if not d[axis]])
    for value, d in zip(function(*leaves), differs, strict=True)
  ]


def _two_axes(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Puts ones in front of the shape."""
  return (1,) * (2 - len(shape)) + shape
