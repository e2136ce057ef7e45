"""The start of a fit: prototypes are centres of the keys."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from spectraformer_jax import checks
from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.prepared import as_variables
from spectraformer_jax.linearize.problem import arrays_of, scaled
from spectraformer_jax.typing import Array, FeatureVariables, Params

# Keys of all sequences that the centres of one map are found among.
NUM_KEYS = 2048
LLOYD_STEPS = 5
# Squared distances of equal points, and of points before the first is drawn.
_NO_DISTANCE, _ANY_DISTANCE = 1e-30, 1e30


def start_from_data(
  rng: Array,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  query: Float[Array, "B T NG H"],
  key: Float[Array, "B S N H"],
  *,
  scale: float | Float[Array, ""] | None = None,
  key_mask: Bool[Array, "B S"] | None = None,
  query_mask: Bool[Array, "B T"] | None = None,
) -> FeatureVariables:
  """Starts a map's learnable parameters from keys, where the map can do so.

  The M centres of up to 2048 keys of a head (k-means) become its prototypes;
  what they mean is the component's affair, see `Component.start`.

  Args:
    rng: PRNG key.
    feature_map: the map.
    variables: from ``feature_map.init(rng, head_dim=H, num_heads=N or 1)``. If
      one set serves all heads, it is started from the keys of all heads.
    query: ``[B, T, N, H]``, unscaled as in `spectral_attention`.
    key: ``[B, S, N, H]``.
    scale: of ``query . key``; None means ``1 / sqrt(H)``.
    key_mask: ``[B, S]`` bool: keys that count.
    query_mask: ``[B, T]`` bool: queries that count.

  Returns:
    The variables; unchanged if the component has no start from data.

  Raises:
    ValueError: arrays do not agree or are not finite, or the variables are not
      those of this map.

  References:
    Lloyd 1982, Least squares quantization in PCM, section II.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("prototypes", "none", num_features=3)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> x = jnp.eye(4)[None, :3, None]
    >>> v = start_from_data(jax.random.key(0), fm, v, x, x, scale=1.0)
    >>> v.params["component"]["query_rows"].sum(axis=1).tolist()
    [[1.0, 1.0, 1.0, 0.0]]
  """
  arrays = AttentionArrays(query, key, key, key_mask, query_mask)
  arrays = arrays_of(arrays, needs_value=False)
  variables = as_variables(variables)
  feature_map.check_inputs(variables, arrays.key)
  component = variables.params.get("component", {})
  if not component or not feature_map.component.starts_from_data:
    return variables
  sqrt_scale, factor = checks.split_scale(scale, arrays.key.shape[-1])
  factor = sqrt_scale if factor is None else factor
  started = _start(feature_map, rng, component, arrays, jnp.float32(factor))
  return variables._replace(params={**variables.params, "component": started})


@functools.partial(jax.jit, static_argnames="feature_map")
def _start(
  feature_map: FeatureMap,
  rng: Array,
  params: Params,
  arrays: AttentionArrays,
  sqrt_scale: Array,
) -> Params:
  """Computes the component's parameters of all heads at once."""
  key = scaled(arrays.key, arrays.key_mask, sqrt_scale)
  num_centres = feature_map.num_features
  # From `arrays_of`; components that start from data take a number of features.
  assert arrays.key_mask is not None and num_centres is not None
  is_key = arrays.key_mask.reshape(-1)
  points = jnp.moveaxis(key, 2, 0).reshape(key.shape[2], -1, key.shape[3])
  total = jnp.sum(points, axis=1)
  mean = total / jnp.sum(is_key).astype(total.dtype)
  sample_rng, centre_rng = jax.random.split(rng)
  num_maps = jax.tree.leaves(params)[0].shape[0]
  heads_of_map = key.shape[2] // num_maps
  size = min(max(NUM_KEYS // heads_of_map, 1), is_key.size)
  noise = jax.random.gumbel(sample_rng, is_key.shape)
  chosen = jax.lax.top_k(jnp.where(is_key, noise, -jnp.inf), size)[1]
  of_map = lambda x: x.reshape(num_maps, -1, x.shape[-1])
  points = of_map(points[:, chosen])
  is_point = jnp.tile(is_key[chosen], heads_of_map)
  mean = jnp.mean(of_map(mean), axis=1)
  centres = jax.vmap(k_means, (0, 0, None, None))(
    jax.random.split(centre_rng, num_maps),
    points,
    is_point,
    num_centres,
  )
  return jax.vmap(feature_map.component.start)(params, centres, mean)


def k_means(
  rng: Array, points: Array, is_point: Array, num_centres: int
) -> Array:
  """Returns the centres of points after some of Lloyd's steps, ``[M, H]``.

  A centre to which no point is nearest keeps its place.

  Args:
    rng: PRNG key.
    points: ``[P, H]``.
    is_point: bool ``[P]``; the others do not count. At least one does.
    num_centres: M.

  Example:
    >>> points = jnp.array([[0.0], [1.0], [10.0], [11.0], [99.0]])
    >>> is_point = jnp.array([True] * 4 + [False])
    >>> centres = k_means(jax.random.key(0), points, is_point, 2)
    >>> sorted(centres[:, 0].tolist())
    [0.5, 10.5]
  """

  def step(_: Array, centres: Array) -> Array:
    half = 0.5 * jnp.sum(jnp.square(centres), axis=1)
    nearest = jnp.argmax(points @ centres.T - half[None], axis=1)
    is_nearest = jax.nn.one_hot(nearest, num_centres) * is_point[:, None]
    count = jnp.sum(is_nearest, axis=0)[:, None]
    mean = is_nearest.T @ points / jnp.maximum(count, 1.0)
    return jnp.where(count > 0.0, mean, centres)

  first = _distant_points(rng, points, is_point, num_centres)
  return jax.lax.fori_loop(0, LLOYD_STEPS, step, first)


def _distant_points(
  rng: Array, points: Array, is_point: Array, count: int
) -> Array:
  """Draws points, each by its squared distance from the nearest before it.

  So equal points are drawn twice only if there are not enough others. Arguments
  as in `k_means`; this is its usual start, k-means++ (Arthur and Vassilvitskii,
  2007, section 2.2).
  """

  def draw(nearest: Array, rng: Array) -> tuple[Array, Array]:
    log_weight = jnp.log(jnp.maximum(nearest, _NO_DISTANCE))
    chosen = jax.random.categorical(
      rng, jnp.where(is_point, log_weight, -jnp.inf)
    )
    point = points[chosen]
    square = jnp.sum(jnp.square(points - point[None]), axis=1)
    return jnp.minimum(nearest, square), point

  far = jnp.full(is_point.shape, _ANY_DISTANCE, points.dtype)
  return jax.lax.scan(draw, far, jax.random.split(rng, count))[1]
