"""What `checks` checks of a pair, one function each.

All raise an AssertionError that begins with the pair's name.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp

from spectraformer_jax.components import ComponentState
from spectraformer_jax.typing import FeatureVariables, WeightSample

# What a bounded factor may reach: cosines, signs and small sums of them.
FACTOR_BOUND = 8.0


def require(condition: bool, message: str) -> None:
  """AssertionError with `message` unless `condition`."""
  if not condition:
    raise AssertionError(message)


def self_stats(feature_map, variables, x):
  """Stats for queries and keys x ``[T, N, H]``."""
  return jax.jit(feature_map.calibrate)(variables, x[None], x[None])


def check_shapes(feature_map, head_dim, must_fit) -> None:
  """Shapes and dtypes, without computing anything."""
  name, rng = feature_map.info.name, jax.random.key(0)
  sizes = f"num_features={feature_map.num_features}, head_dim={head_dim}"
  heads, length = 2, 3
  for dtype in (jnp.float32, jnp.bfloat16):
    x = jnp.ones((1, length, heads, head_dim), dtype)
    try:
      variables = jax.eval_shape(
        lambda rng, dtype=dtype: feature_map.init(
          rng, head_dim=head_dim, num_heads=heads, dtype=dtype
        ),
        rng,
      )
    except ValueError as error:
      require(not must_fit, f"{name} refuses {sizes}: {error}")
      require(
        "num_features" in str(error) or "head_dim" in str(error),
        f"{name} refuses {sizes} without naming the argument: {error}",
      )
      return
    shapes = [leaf.shape for leaf in jax.tree.leaves(variables)]
    require(
      all(shape[:1] == (heads,) for shape in shapes),
      f"{name}, {sizes}: leaves must lead with the heads, [{heads}, ...], got "
      f"shapes {shapes}.",
    )
    for part, known in zip(
      variables, ({jnp.float32}, {jnp.float32, dtype}), strict=True
    ):
      wrong = [
        leaf.dtype
        for leaf in jax.tree.leaves(part)
        if leaf.dtype not in map(jnp.dtype, known)
      ]
      require(not wrong, f"{name}, {sizes}: leaves of {wrong}, want {known}.")
    feature_dim = feature_map.component.feature_dim(
      feature_map.num_features, head_dim
    )
    require(
      feature_map.feature_dim in (None, feature_dim),
      f"{name}: feature_dim(M, None)={feature_map.feature_dim} but "
      f"feature_dim(M, {head_dim})={feature_dim}.",
    )

    def features(variables, x, side):
      stats = feature_map.calibrate(variables, x, x)
      return (
        feature_map.apply(variables, x, side=side, stats=stats),
        feature_map.log_features(variables, x, side=side, stats=stats),
      )

    for side in ("query", "key"):
      phi, log_phi = jax.eval_shape(
        lambda v, x, side=side: features(v, x, side), variables, x
      )
      hint = f"{name}, {sizes}, side={side!r}, x of {jnp.dtype(dtype)}"
      chex.assert_shape(
        phi, (1, length, heads, feature_dim), custom_message=hint
      )
      chex.assert_type(
        jax.tree.leaves((phi, log_phi)), jnp.float32, custom_message=hint
      )
      require(
        log_phi.log_magnitude.shape[-1] in (1, feature_dim),
        f"{hint}: log_magnitude has shape {log_phi.log_magnitude.shape}.",
      )


def check_keys(feature_map, head_dim) -> FeatureVariables:
  """One key, one draw; another key or head, another draw. Works under jit.

  Returns the variables of key 0 with two heads.
  """
  name = feature_map.info.name
  init = jax.jit(
    lambda rng: feature_map.init(rng, head_dim=head_dim, num_heads=2)
  )
  variables = init(jax.random.key(0))
  chex.assert_trees_all_equal(
    init(jax.random.key(0)),
    variables,
    custom_message=f"{name}: one key must give one draw",
  )
  chex.assert_tree_all_finite(variables, custom_message=name)
  redrawable = feature_map.weight_matrix.info.redrawable
  if redrawable and jax.tree.leaves(variables.projection):
    other = init(jax.random.key(1))
    require(
      not _equal(other.projection, variables.projection),
      f"{name}: different keys must give different projections.",
    )
    first, second = (
      jax.tree.map(lambda leaf, head=head: leaf[head], variables.projection)
      for head in range(2)
    )
    require(
      not _equal(first, second),
      f"{name}: heads must draw their own projections.",
    )
  return variables


def check_features(feature_map, variables, x, stats) -> None:
  """`apply` is factor * exp(log_magnitude); bounded; heads do not mix."""
  name = feature_map.info.name

  @jax.jit
  def features(variables, x, stats):
    return [
      (
        feature_map.apply(variables, x, side=side, stats=stats),
        feature_map.log_features(variables, x, side=side, stats=stats),
      )
      for side in ("query", "key")
    ]

  first = features(variables, x, stats)
  for phi, out in first:
    chex.assert_tree_all_finite(phi, custom_message=f"{name}: features")
    factor = 1.0 if out.factor is None else out.factor
    chex.assert_trees_all_close(
      jnp.broadcast_to(factor * jnp.exp(out.log_magnitude), phi.shape),
      phi,
      # Fused exponents differ in their last bits.
      rtol=1e-4,
      atol=1e-6,
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
  _check_heads(name, features, first, variables, x, stats)


def _check_heads(name, features, first, variables, x, stats) -> None:
  """Heads do not mix, and one shared head equals copies of it."""
  swap = lambda axis: lambda leaf: jnp.flip(leaf, axis)
  swapped = features(
    jax.tree.map(swap(0), variables),
    swap(1)(x),
    # Leaves of stats lead with [batch, heads].
    jax.tree.map(swap(1), stats),
  )
  chex.assert_trees_all_close(
    [jnp.flip(phi, 1) for phi, _ in swapped],
    [phi for phi, _ in first],
    rtol=1e-4,
    atol=1e-6,
    custom_message=f"{name}: a head must not depend on other heads",
  )
  shared = jax.tree.map(lambda leaf: leaf[:1], variables)
  copies = jax.tree.map(lambda leaf: jnp.repeat(leaf, 2, axis=0), shared)
  chex.assert_trees_all_close(
    [phi for phi, _ in features(shared, x, stats)],
    [phi for phi, _ in features(copies, x, stats)],
    rtol=1e-4,
    atol=1e-6,
    custom_message=f"{name}: num_heads=1 must equal copies of one head",
  )


def check_gradients(feature_map, variables, x, stats) -> None:
  """Finite gradients for x and params: at zero, at one, and far out."""

  def loss(params, x):
    total = 0.0
    for side in ("query", "key"):
      out = feature_map.log_features(
        variables._replace(params=params), x, side=side, stats=stats
      )
      top = jax.lax.stop_gradient(jnp.max(out.log_magnitude))
      top = jnp.where(jnp.isfinite(top), top, 0.0)
      factor = 1.0 if out.factor is None else out.factor
      total += jnp.sum(factor * jnp.exp(out.log_magnitude - top))
    return total

  gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))
  for scale in (0.0, 1.0, 30.0):
    chex.assert_tree_all_finite(
      gradient(variables.params, scale * x),
      custom_message=f"{feature_map.info.name}: gradients at scale {scale}",
    )


def check_query_features(feature_map, variables, x, stats) -> None:
  """`Component.query_features` lack nothing but a factor of each token."""
  prepared = feature_map.prepare(variables, stats)
  heads_first = jnp.swapaxes(x, 0, 1)[None]
  whole, part = (
    feature_map.prepared_features(
      prepared, heads_first, side="query", for_attention=for_attention
    )
    for for_attention in (False, True)
  )
  left_out = whole.log_magnitude - part.log_magnitude
  chex.assert_trees_all_close(
    (left_out, whole.factor),
    (jnp.broadcast_to(left_out[..., :1], left_out.shape), part.factor),
    rtol=1e-5,
    atol=1e-4,
    custom_message=f"{feature_map.info.name}: query_features",
  )


def check_redraw(feature_map, variables) -> None:
  """A new projection of the same shapes, the same params; or a refusal."""
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


def check_row_order(component, name) -> None:
  """Feature f depends on row f mod M alone: row weights rely on it."""
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
  state = ComponentState(
    component.init(rng, head_dim),
    component.draw(rng, num_rows, head_dim),
    component.solve(component.moments(x, x, None, None))
    if component.needs_stats
    else (),
  )

  def features(rows):
    out = component.log_features(x, WeightSample(rows), "query", state)
    factor = 1.0 if out.factor is None else out.factor
    return (factor * jnp.exp(out.log_magnitude))[0]

  moved = jnp.any(jax.jit(jax.jacobian(features))(rows) != 0.0, axis=-1)
  size = moved.shape[0]
  own = jnp.arange(size)[:, None] % num_rows == jnp.arange(num_rows)[None, :]
  require(
    not bool((moved & ~own).any()),
    f"{name}: features must have the row axis innermost (feature f from row "
    "f mod M): row weights are tiled in that order.",
  )


def check_learner(feature_map, name) -> None:
  """Every parameter has a gradient, at the start or after one step."""
  init = jax.jit(lambda rng: feature_map.init(rng, head_dim=4))
  variables = init(jax.random.key(0))
  require(
    bool(jax.tree.leaves(variables.params)),
    f"{name}: info.learnable, but init makes no params.",
  )
  x = jax.random.normal(jax.random.key(1), (3, 1, 4))
  stats = self_stats(feature_map, variables, x)

  @jax.jit
  @jax.grad
  def gradient(params):
    current = variables._replace(params=params)
    phi = feature_map.apply(current, x, side="query", stats=stats)
    return jnp.sum(phi * jax.random.normal(jax.random.key(2), phi.shape))

  first = gradient(variables.params)
  stepped = jax.tree.map(lambda p, g: p - 0.1 * g, variables.params, first)
  second = gradient(stepped)
  chex.assert_tree_all_finite((first, second), custom_message=name)
  stuck = [
    jax.tree_util.keystr(path)
    for (path, one), two in zip(
      jax.tree_util.tree_leaves_with_path(first),
      jax.tree.leaves(second),
      strict=True,
    )
    if not bool(jnp.any(one != 0.0) | jnp.any(two != 0.0))
  ]
  require(not stuck, f"{name}: parameters without any gradient: {stuck}.")


def _equal(tree: Any, other: Any) -> bool:
  """Whether two trees hold the same numbers."""
  same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), tree, other)
  return all(jax.tree.leaves(same))
