"""The checks that make up `check_feature_map` and `check_component`.

Each raises an AssertionError that begins with the name of the pair.
"""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from spectraformer_jax.components import Component
from spectraformer_jax.feature_maps.feature_map import SIDES, FeatureMap
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  FeatureVariables,
  LogFeatures,
  PyTree,
  WeightSample,
)

# Largest size of a bounded factor: a cosine, a sign or a small sum of them.
FACTOR_BOUND = 8.0


def require(condition: bool, message: str) -> None:
  """Raises an AssertionError with `message` unless `condition` holds."""
  if not condition:
    raise AssertionError(message)


def self_stats(
  feature_map: FeatureMap, variables: FeatureVariables, x: Array
) -> PyTree:
  """Returns the stats if x ``[T, N, H]`` is both queries and keys."""
  return jax.jit(feature_map.calibrate)(variables, x[None], x[None])


def features_of_sides(
  feature_map: FeatureMap, variables: FeatureVariables, x: Array, stats: PyTree
) -> list[tuple[Array, LogFeatures]]:
  """Returns features and log-features of x, as queries and as keys."""
  return [
    (
      feature_map.apply(variables, x, side=side, stats=stats),
      feature_map.log_features(variables, x, side=side, stats=stats),
    )
    for side in SIDES
  ]


def multiply(out: LogFeatures, log_scale: Array | float = 0.0) -> Array:
  """Returns ``factor * exp(log_magnitude - log_scale)``."""
  magnitude = jnp.exp(out.log_magnitude - log_scale)
  return magnitude if out.factor is None else out.factor * magnitude


def check_shapes(
  feature_map: FeatureMap, head_dim: int, must_fit: bool
) -> None:
  """Checks shapes and dtypes, without computing anything.

  Unless `must_fit`, the pair may refuse these sizes.
  """
  name, num_features = feature_map.info.name, feature_map.num_features
  hint = f"{name}, num_features={num_features}, head_dim={head_dim}"
  heads, length = 2, 3
  for dtype in (jnp.float32, jnp.bfloat16):
    init = functools.partial(
      feature_map.init, head_dim=head_dim, num_heads=heads, dtype=dtype
    )
    try:
      variables = jax.eval_shape(init, jax.random.key(0))
    except ValueError as error:
      require(not must_fit, f"{hint}, are refused: {error}")
      require(
        "num_features" in str(error) or "head_dim" in str(error),
        f"{hint}, are refused without naming the argument: {error}",
      )
      return
    shapes = [leaf.shape for leaf in jax.tree.leaves(variables)]
    require(
      all(shape[:1] == (heads,) for shape in shapes),
      f"{hint}: leaves must lead with the heads, [{heads}, ...], got shapes "
      f"{shapes}.",
    )
    for part, allowed in zip(
      variables, ({jnp.float32}, {jnp.float32, dtype}), strict=True
    ):
      dtypes = {leaf.dtype for leaf in jax.tree.leaves(part)}
      wrong = dtypes - set(map(jnp.dtype, allowed))
      require(not wrong, f"{hint}: leaves of {wrong}, want {allowed}.")
    feature_dim = feature_map.component.feature_dim(num_features or 0, head_dim)
    require(
      feature_map.feature_dim in (None, feature_dim),
      f"{name}: feature_dim(M, None)={feature_map.feature_dim} but "
      f"feature_dim(M, {head_dim})={feature_dim}.",
    )

    def features(
      variables: FeatureVariables, x: Array
    ) -> list[tuple[Array, LogFeatures]]:
      stats = feature_map.calibrate(variables, x, x)
      return features_of_sides(feature_map, variables, x, stats)

    x = jax.ShapeDtypeStruct((1, length, heads, head_dim), dtype)
    of_sides = jax.eval_shape(features, variables, x)
    for side, (phi, out) in zip(SIDES, of_sides, strict=True):
      message = f"{hint}, side={side!r}, x of {jnp.dtype(dtype)}"
      shape = (1, length, heads, feature_dim)
      chex.assert_shape(phi, shape, custom_message=message)
      leaves = jax.tree.leaves((phi, out))
      chex.assert_type(leaves, jnp.float32, custom_message=message)
      require(
        out.log_magnitude.shape[-1] in (1, feature_dim),
        f"{message}: log_magnitude has shape {out.log_magnitude.shape}.",
      )


def check_keys(feature_map: FeatureMap, head_dim: int) -> FeatureVariables:
  """Checks that draws depend on the PRNG key and the head, and nothing else.

  Returns:
    The variables of key 0, with two heads.
  """
  name = feature_map.info.name
  init = jax.jit(
    functools.partial(feature_map.init, head_dim=head_dim, num_heads=2)
  )
  variables = init(jax.random.key(0))
  chex.assert_trees_all_equal(
    init(jax.random.key(0)),
    variables,
    custom_message=f"{name}: one key must give one draw",
  )
  chex.assert_tree_all_finite(variables, custom_message=name)
  projection = variables.projection
  if feature_map.weight_matrix.info.redrawable and jax.tree.leaves(projection):
    require(
      not _equal(init(jax.random.key(1)).projection, projection),
      f"{name}: different keys must give different projections.",
    )
    first, second = (
      jax.tree.map(lambda leaf, head=head: leaf[head], projection)
      for head in range(2)
    )
    require(
      not _equal(first, second),
      f"{name}: heads must draw their own projections.",
    )
  return variables


def check_features(
  feature_map: FeatureMap, variables: FeatureVariables, x: Array, stats: PyTree
) -> None:
  """Checks that `apply` and `log_features` agree and that factors are bounded.

  Also checks that heads do not mix.
  """
  name = feature_map.info.name
  features = jax.jit(functools.partial(features_of_sides, feature_map))
  # `jit` fuses the exponential of `apply`, so its last bits differ.
  assert_close = functools.partial(
    chex.assert_trees_all_close, rtol=1e-4, atol=1e-6
  )
  of_sides = features(variables, x, stats)
  for phi, out in of_sides:
    chex.assert_tree_all_finite(phi, custom_message=f"{name}: features")
    assert_close(
      jnp.broadcast_to(multiply(out), phi.shape),
      phi,
      custom_message=f"{name}: apply must be factor * exp(log_magnitude)",
    )
    require(
      bool((phi >= 0).all()) or not feature_map.info.positive,
      f"{name}: info.positive, but a feature is negative.",
    )
  for scale in (1.0, 100.0):
    for _, out in features(variables, scale * x, stats):
      require(
        bool((out.log_magnitude < jnp.inf).all()),
        f"{name}: log_magnitude must be finite or -inf at scale {scale}.",
      )
      top = 0.0 if out.factor is None else float(jnp.max(jnp.abs(out.factor)))
      require(
        top <= FACTOR_BOUND,
        f"{name}: the factor must be bounded, is {top:.3g} at scale {scale}; "
        "sizes belong into log_magnitude.",
      )
  flip = lambda tree, axis: jax.tree.map(lambda x: jnp.flip(x, axis), tree)
  # Leaves of variables lead with [heads], those of stats with [batch, heads].
  swapped = features(flip(variables, 0), flip(x, 1), flip(stats, 1))
  assert_close(
    [jnp.flip(phi, 1) for phi, _ in swapped],
    [phi for phi, _ in of_sides],
    custom_message=f"{name}: a head must not depend on other heads",
  )
  shared = jax.tree.map(lambda leaf: leaf[:1], variables)
  copies = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), shared)
  assert_close(
    [phi for phi, _ in features(shared, x, stats)],
    [phi for phi, _ in features(copies, x, stats)],
    custom_message=f"{name}: num_heads=1 must equal copies of one head",
  )


def check_gradients(
  feature_map: FeatureMap, variables: FeatureVariables, x: Array, stats: PyTree
) -> None:
  """Checks that gradients are finite at x times 0, 1 and 30."""

  def loss(params: PyTree, x: Array) -> Array:
    total = jnp.float32(0.0)
    for side in SIDES:
      out = feature_map.log_features(
        variables._replace(params=params), x, side=side, stats=stats
      )
      top = jax.lax.stop_gradient(jnp.max(out.log_magnitude))
      top = jnp.where(jnp.isfinite(top), top, 0.0)
      total += jnp.sum(multiply(out, top))
    return total

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  for scale in (0.0, 1.0, 30.0):
    chex.assert_tree_all_finite(
      gradient(variables.params, scale * x),
      custom_message=f"{feature_map.info.name}: gradients at scale {scale}",
    )


def check_query_features(
  feature_map: FeatureMap, variables: FeatureVariables, x: Array, stats: PyTree
) -> None:
  """Checks that `query_features` lacks nothing but a factor of each token."""
  prepared = feature_map.prepare(variables, stats)
  heads_first = jnp.swapaxes(x, 0, 1)[None]
  whole, part = (
    feature_map.prepared_features(
      prepared, heads_first, side="query", for_attention=for_attention
    )
    for for_attention in (False, True)
  )
  token_factor = whole.log_magnitude - part.log_magnitude
  expected = jnp.broadcast_to(token_factor[..., :1], token_factor.shape)
  chex.assert_trees_all_close(
    (token_factor, whole.factor),
    (expected, part.factor),
    rtol=1e-5,
    atol=1e-4,
    custom_message=f"{feature_map.info.name}: query_features",
  )


def check_redraw(feature_map: FeatureMap, variables: FeatureVariables) -> None:
  """Checks that `redraw` keeps params and shapes, or refuses."""
  name, info = feature_map.info.name, feature_map.weight_matrix.info
  redraw = jax.jit(feature_map.redraw)
  if not info.redrawable:
    try:
      redraw(jax.random.key(2), variables)
    except ValueError as error:
      require(info.name in str(error), f"{name}: redraw's error: {error}")
      return
    raise AssertionError(f"{name}: redrawable=False, but redraw works.")
  redrawn = redraw(jax.random.key(2), variables)
  chex.assert_trees_all_equal(
    redrawn.params,
    variables.params,
    custom_message=f"{name}: redraw must keep the params",
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(
    redrawn, variables, custom_message=f"{name}: redraw"
  )
  if jax.tree.leaves(variables.projection):
    require(
      not _equal(redrawn.projection, variables.projection),
      f"{name}: redraw must change the projection.",
    )


def check_row_order(component: Component, name: str) -> None:
  """Checks that feature f depends on row f mod M only."""
  num_rows, head_dim = 3, 4
  if component.info.row_law != "gaussian":
    return
  try:
    component.check(num_rows, head_dim)
  except ValueError:
    return
  if component.num_rows(num_rows) != num_rows:
    return
  rng = jax.random.key(0)
  rows = jax.random.normal(rng, (num_rows, head_dim))
  x = jax.random.normal(jax.random.key(1), (3, head_dim))
  stats = ()
  if component.needs_stats:
    stats = component.solve(component.moments(x, x, None, None))
  params = component.init(rng, head_dim, num_rows)
  state = ComponentState(params, component.draw(rng, num_rows, head_dim), stats)

  def features(rows: Array) -> Array:
    sample = WeightSample(rows)
    return multiply(component.log_features(x, sample, "query", state))[0]

  depends = jnp.any(jax.jit(jax.jacobian(features))(rows) != 0.0, axis=-1)
  index = jnp.arange(depends.shape[0])[:, None]
  allowed = index % num_rows == jnp.arange(num_rows)[None, :]
  require(
    not bool((depends & ~allowed).any()),
    f"{name}: features must have the row axis innermost (feature f from row "
    "f mod M): row weights are tiled in that order.",
  )


def check_learner(feature_map: FeatureMap, name: str) -> None:
  """Checks that each parameter has a gradient, at once or after one step."""
  init = jax.jit(functools.partial(feature_map.init, head_dim=4))
  variables = init(jax.random.key(0))
  require(
    bool(jax.tree.leaves(variables.params)),
    f"{name}: info.learnable, but init makes no params.",
  )
  x = jax.random.normal(jax.random.key(1), (3, 1, 4))
  stats = self_stats(feature_map, variables, x)

  @jax.jit
  @jax.grad
  def gradient(params: PyTree) -> Array:
    current = variables._replace(params=params)
    total = jnp.float32(0.0)
    for phi, _ in features_of_sides(feature_map, current, x, stats):
      total += jnp.sum(phi * jax.random.normal(jax.random.key(2), phi.shape))
    return total

  first = gradient(variables.params)
  stepped = jax.tree.map(lambda p, g: p - 0.1 * g, variables.params, first)
  second = gradient(stepped)
  chex.assert_tree_all_finite((first, second), custom_message=name)
  is_zero = jax.tree.map(
    lambda one, two: not bool(jnp.any(one != 0.0) | jnp.any(two != 0.0)),
    first,
    second,
  )
  stuck = [
    jax.tree_util.keystr(path)
    for path, zero in jax.tree_util.tree_leaves_with_path(is_zero)
    if zero
  ]
  require(not stuck, f"{name}: parameters without any gradient: {stuck}.")


def _equal(tree: Any, other: Any) -> bool:
  """Returns whether two trees hold the same numbers."""
  same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), tree, other)
  return all(jax.tree.leaves(same))
