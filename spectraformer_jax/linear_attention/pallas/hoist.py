"""What a feature map computes from constants alone, taken out of the kernel.

A Pallas kernel should do what differs from token to token, and can do little
else: no decompositions, no reshapes of odd shapes. So the map is traced once,
and cut where the token comes in. What comes before runs in plain XLA, with its
gradients; its results are arrays that the kernel keeps on chip.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp

from spectraformer_jax.linear_attention.state import Maps
from spectraformer_jax.typing import Array, PyTree

Var = jax.extend.core.Var


class PerToken(NamedTuple):
  """What is left of a feature map: a function of constants and tokens.

  Attributes:
    function: of some constants of one head, and tokens ``[C, H]``, to
      log-features ``[C, F]``.
    uses: which constants, in the order of its arguments.
  """

  function: jax.extend.core.ClosedJaxpr
  uses: list[int]

  def __call__(self, constants: Sequence[Array], x: Array) -> Array:
    """Log-features ``[C, F]`` of x ``[C, H]``, with constants ``[R, K]``."""
    shapes = [aval.shape for aval in self.function.in_avals[:-1]]
    arguments = [
      jnp.reshape(constants[use], shape)
      for use, shape in zip(self.uses, shapes, strict=True)
    ]
    return jax.extend.core.jaxpr_as_fun(self.function)(*arguments, x)[0]


class Hoisted(NamedTuple):
  """The feature maps of the two sides, cut in two.

  Attributes:
    constants: what the first part computes for both sides,
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
  """Cuts feature maps where they meet the tokens.

  Args:
    maps: with log-magnitudes alone.
    constants: their variables; leaves lead with ``[B or 1, N or 1]``.
    query: shape and dtype of a chunk, ``[C, H]``.
    key: the same for keys.

  Returns:
    The two parts, or in words why the maps cannot be cut.
  """
  leaves, tree = jax.tree.flatten(constants)

  def of_one_head(leaves, query, key, position):
    constants = tree.unflatten([leaf[None, None] for leaf in leaves])
    logs = (
      feature_map(constants, x[None, None], position).log_magnitude
      for feature_map, x in zip(maps, (query, key), strict=True)
    )
    return [jnp.squeeze(log, (0, 1)) for log in logs]

  one_head = [jax.ShapeDtypeStruct(a.shape[2:], a.dtype) for a in leaves]
  traced = jax.make_jaxpr(of_one_head)(one_head, query, key, jnp.int32(0))
  *inputs, query, key, position = traced.jaxpr.invars
  # For each variable known without tokens: does it differ between examples,
  # and between heads?
  differs = {var: (False, False) for var in traced.jaxpr.constvars}
  for var, leaf in zip(inputs, leaves, strict=True):
    differs[var] = leaf.shape[0] > 1, leaf.shape[1] > 1
  before, after, free = [], [], set()
  for equation in traced.eqns:
    used = _variables(equation.invars)
    if free.issuperset(used):
      # Zeros and the like: cheaper to make on chip than to bring there.
      before.append(equation)
      after.append(equation)
      free.update(equation.outvars)
    elif all(var in differs or var in free for var in used):
      before.append(equation)
      known = [differs[var] for var in used if var in differs]
      either = [any(axis) for axis in zip(*known, strict=True)]
      differs.update((var, tuple(either)) for var in equation.outvars)
    else:
      after.append(equation)
  outputs = traced.jaxpr.outvars
  after = _needed(after, outputs)
  used = _variables(atom for equation in after for atom in equation.invars)
  if position in used:
    return "its features depend on positions"
  wanted = [var for var in dict.fromkeys(used) if var in differs]
  for var in wanted:
    if var.aval.dtype != jnp.float32 or len(var.aval.shape) > 2:
      return f"it needs a constant of type {var.aval.str_short()} on chip"
  first = _first_equal(before)
  unique = list(dict.fromkeys(first.get(var, var) for var in wanted))
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

  def per_token(token, output):
    equations = _needed(after, [output])
    used = {v for equation in equations for v in _variables(equation.invars)}
    own = [var for var in wanted if var in used]
    return PerToken(
      _function(traced.jaxpr, equations, [*own, token], [output]),
      [unique.index(first.get(var, var)) for var in own],
    )

  return Hoisted(
    values, per_token(query, outputs[0]), per_token(key, outputs[1])
  )


def primitives(equations: Sequence) -> set[str]:
  """Names of all primitives, inner functions included."""
  names = set()
  for equation in equations:
    inner = list(jax.extend.core.jaxprs_in_params(equation.params))
    for jaxpr in inner:
      names |= primitives(jaxpr.eqns)
    if not inner:
      names.add(equation.primitive.name)
  return names


def _variables(atoms) -> list[Var]:
  """Those that are not literals."""
  return [a for a in atoms if not isinstance(a, jax.extend.core.Literal)]


def _needed(equations, outputs) -> list:
  """Those that outputs depend on."""
  wanted, kept = set(_variables(outputs)), []
  for equation in reversed(equations):
    if wanted.intersection(equation.outvars):
      wanted.update(_variables(equation.invars))
      kept.append(equation)
  return kept[::-1]


def _first_equal(equations) -> dict[Var, Var]:
  """For results computed before from the same inputs: the first of them."""
  first, results = {}, {}
  for equation in equations:
    if any(jax.extend.core.jaxprs_in_params(equation.params)):
      continue
    inputs = (
      first.get(a, a) if isinstance(a, Var) else repr(a)
      for a in equation.invars
    )
    what = equation.primitive, tuple(inputs), repr(equation.params)
    same = results.setdefault(what, equation.outvars)
    if same is not equation.outvars:
      first.update(zip(equation.outvars, same, strict=True))
  return first


def _function(jaxpr, equations, inputs, outputs):
  """Part of a jaxpr."""
  part = jaxpr.replace(
    constvars=[], invars=inputs, outvars=outputs, eqns=equations
  )
  return jax.extend.core.ClosedJaxpr(part, [])


def _over_leading_axes(
  function: Callable, leaves: Sequence[Array], differs: Sequence[tuple]
) -> list[Array]:
  """Maps over ``[B or 1, N or 1]``; a result leads with 1 where it is shared.

  Args:
    function: of leaves without leading axes, to a list.
    leaves: with them.
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


def _two_axes(shape: tuple[int, ...]) -> tuple[int, int]:
  """The shape with ones in front."""
  return (1,) * (2 - len(shape)) + shape
