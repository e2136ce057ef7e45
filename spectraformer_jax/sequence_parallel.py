"""One sequence over many devices: only sums over keys travel."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from spectraformer_jax import checks, meshes
from spectraformer_jax.attention import maps_of, statistics_of_keys
from spectraformer_jax.attention_checks import check_spectral_inputs
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.prepared import as_variables
from spectraformer_jax.linear_attention.api import start
from spectraformer_jax.linear_attention.state import LOWEST, State, power_of_two
from spectraformer_jax.linear_attention.xla import bidirectional, causal
from spectraformer_jax.typing import Array, FeatureVariables, PyTree


def sequence_parallel_attention(
  query: Array,
  key: Array,
  value: Array,
  *,
  mesh: Mesh,
  axis: str,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | None = None,
  is_causal: bool = False,
  key_mask: Array | None = None,
  query_mask: Array | None = None,
  chunk_size: int | None = None,
) -> Array:
  """`spectral_attention` of sequences whose positions lie on several devices.

  Each device sums over its own keys; the sums, ``[B, N, F, V]``, are exchanged
  by one all-gather, whatever the length; then each device attends its own
  queries. Query, key and value stay where they are. Other axes of the mesh
  (batch, heads) are left to the compiler.

  Args:
    query: ``[B, T, N, H]``; N may be a multiple of the keys' heads.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    mesh: devices; see `jax.make_mesh`. Over its Explicit axes arrays are
      divided first, if they are not yet.
    axis: name of the mesh axis that T and S are divided over.
    feature_map: see `spectral_attention`, as all that follow.
    variables: replicated.
    stats: data-dependent parameters; None computes them from the keys of all
      devices.
    scale: of ``query . key``.
    is_causal: query i sees keys 0..i.
    key_mask: ``[B, S]`` bool.
    query_mask: ``[B, T]`` bool.
    chunk_size: positions in one chunk of a device.

  Returns:
    ``[B, T, N, V]`` in value's dtype, divided like query.

  Raises:
    ValueError: as `spectral_attention`; an axis the mesh does not have, or one
      that does not divide T and S.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8)
    >>> mesh = Mesh(jax.devices(), ("sequence",))
    >>> x = jnp.ones((1, 16 * len(jax.devices()), 2, 8))
    >>> sequence_parallel_attention(
    ...   x, x, x, mesh=mesh, axis="sequence", feature_map=fm, variables=v,
    ...   is_causal=True).shape == x.shape
    True
  """
  query, key, value = checks.as_floats(query=query, key=key, value=value)
  key_mask, query_mask = map(checks.as_array, (key_mask, query_mask))
  variables = as_variables(variables)
  check_spectral_inputs(
    query,
    key,
    value,
    feature_map=feature_map,
    variables=variables,
    stats=stats,
    is_causal=is_causal,
    key_mask=key_mask,
    query_mask=query_mask,
  )
  if chunk_size is not None:
    checks.check_positive_int("chunk_size", chunk_size)
  if axis not in mesh.shape:
    raise ValueError(f"axis={axis!r} is not one of the mesh: {mesh.shape}.")
  for name, length in (("query", query.shape[1]), ("key", key.shape[1])):
    if length % mesh.shape[axis]:
      raise ValueError(
        f"{name} length {length} must be a multiple of the {mesh.shape[axis]} "
        f"devices of axis {axis!r}: pad it, and hide the padding by key_mask."
      )
  if is_causal and query.shape[1] != key.shape[1]:
    raise ValueError(
      "is_causal needs query and key of one length where it is divided over "
      f"devices, got query.shape={query.shape}, key.shape={key.shape}."
    )
  if checks.is_empty(query, key, value):
    return jnp.zeros((*query.shape[:3], value.shape[3]), value.dtype)
  root, computed = checks.scale_parts(scale, query.shape[-1])
  query, key = (checks.times_root(x, computed) for x in (query, key))
  return _sequence_parallel(
    query,
    key,
    value,
    variables,
    stats,
    key_mask,
    query_mask,
    feature_map=feature_map,
    root=root,
    is_causal=is_causal,
    chunk=chunk_size,
    mesh=mesh,
    axis=axis,
  )


@functools.partial(
  jax.jit,
  static_argnames=(
    "feature_map",
    "root",
    "is_causal",
    "chunk",
    "mesh",
    "axis",
  ),
)
def _sequence_parallel(
  query,
  key,
  value,
  variables,
  stats,
  key_mask,
  query_mask,
  *,
  feature_map,
  root,
  is_causal,
  chunk,
  mesh,
  axis,
):
  """`sequence_parallel_attention` on checked arguments."""
  run = functools.partial(
    _on_auto_axes,
    feature_map=feature_map,
    root=root,
    is_causal=is_causal,
    chunk=chunk,
    axis=axis,
  )
  masks = key_mask, query_mask
  return meshes.with_auto_axes(
    run, mesh, axis, query, key, value, masks, (variables, stats)
  )


def _on_auto_axes(
  mesh,
  query,
  key,
  value,
  masks,
  maps_and_stats,
  *,
  feature_map,
  root,
  is_causal,
  chunk,
  axis,
):
  """`sequence_parallel_attention` where no mesh axis is Explicit."""
  key_mask, query_mask = masks
  variables, stats = maps_and_stats
  if query_mask is not None:
    query = jnp.where(query_mask[:, :, None, None], query, 0)
  if key_mask is not None:
    visible = key_mask[:, :, None, None]
    key, value = jnp.where(visible, key, 0), jnp.where(visible, value, 0)
  stats = statistics_of_keys(feature_map, variables, stats, key, key_mask, root)
  maps = maps_of(feature_map, root)
  groups = query.shape[2] // key.shape[2]
  is_signed = not feature_map.info.positive

  def on_one_device(constants, query, key, value, keep):
    shape = query.shape
    query = query.reshape(*shape[:2], key.shape[2], groups, shape[3])
    index = jax.lax.axis_index(axis)
    empty = start(maps, constants, key, value.shape[3], is_signed)
    own = bidirectional.accumulate(
      *(maps.key, chunk, constants),
      empty._replace(length=index * key.shape[1]),
      *(key, value, keep),
    )
    state = _sum_over_devices(own, axis, index if is_causal else None)
    position = index * shape[1]
    if is_causal:
      state = state._replace(length=position)
      inputs = (query, key, value, keep, None)
      out, _ = causal.causal(maps, chunk, constants, state, *inputs)
    else:
      out = bidirectional.read(
        maps.query, chunk, value.dtype, constants, state, query, position
      )
    return out.reshape(*shape[:3], -1)

  divided = P(None, axis)
  out = jax.shard_map(
    on_one_device,
    mesh=mesh,
    axis_names={axis},
    in_specs=(P(), divided, divided, divided, divided),
    out_specs=divided,
    # The sums start from constants, which the check would want cast.
    check_vma=False,
  )(feature_map.prepare(variables, stats), query, key, value, key_mask)
  if query_mask is not None:
    out = jnp.where(query_mask[:, :, None, None], out, 0)
  return out


def _sum_over_devices(state: State, axis: str, before: Array | None) -> State:
  """The sums of all devices; with `before`, of those that come before it."""
  every = jax.lax.all_gather(
    (state.kv, state.total, state.magnitude, state.exponent), axis
  )
  kv, total, magnitude, exponent = every
  counts = jnp.ones(exponent.shape[0], bool)
  if before is not None:
    counts = jnp.arange(exponent.shape[0]) < before
  counts = counts[:, None, None, None]
  exponent = jnp.where(counts, jax.lax.stop_gradient(exponent), LOWEST)
  top = jnp.max(exponent, axis=0)
  factor = jnp.where(counts, power_of_two(exponent - top[None]), 0.0)

  def summed(sums):
    return jnp.sum(sums * factor, axis=0)

  return state._replace(
    kv=jnp.sum(kv * factor[..., None], axis=0),
    total=summed(total),
    magnitude=None if magnitude is None else summed(magnitude),
    exponent=top,
  )
