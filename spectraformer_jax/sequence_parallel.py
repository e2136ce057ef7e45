"""Divides a sequence over devices, which exchange sums over keys only."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Bool, Float

from spectraformer_jax import checks, meshes
from spectraformer_jax.attention import (
  maps_of,
  statistics_of_keys,
  with_zeros,
)
from spectraformer_jax.attention_checks import check_spectral_inputs
from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.prepared import as_variables
from spectraformer_jax.linear_attention.api import start
from spectraformer_jax.linear_attention.exponents import LOWEST, power_of_two
from spectraformer_jax.linear_attention.inputs import Call, Inputs
from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.linear_attention.xla import bidirectional, causal
from spectraformer_jax.typing import Array, FeatureVariables, Mask, PyTree


def sequence_parallel_attention(
  query: Float[Array, "B T NG H"],
  key: Float[Array, "B S N H"],
  value: Float[Array, "B S N V"],
  *,
  mesh: Mesh,
  axis: str,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  stats: PyTree = None,
  scale: float | Float[Array, ""] | None = None,
  is_causal: bool = False,
  key_mask: Bool[Array, "B S"] | None = None,
  query_mask: Bool[Array, "B T"] | None = None,
  chunk_size: int | None = None,
) -> Float[Array, "B T NG V"]:
  """Computes `spectral_attention` of sequences divided over several devices.

  Each device sums over its own keys. One all-gather exchanges the sums,
  ``[B, N, F, V]``, whose size does not depend on the length. Then each device
  attends with its own queries. Query, key and value stay where they are. Other
  axes of the mesh (batch, heads) are left to the compiler.

  Args:
    query: ``[B, T, N, H]``; N may be a multiple of the keys' heads.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    mesh: devices; see `jax.make_mesh`. If `axis` is an Explicit axis, arrays
      that it does not divide yet are divided over it first.
    axis: name of the mesh axis that divides T and S.
    feature_map: see `spectral_attention`, like all arguments below.
    variables: replicated.
    stats: data-dependent parameters; None: computed from the keys of all
      devices.
    scale: of ``query . key``.
    is_causal: query i sees keys 0..i.
    key_mask: ``[B, S]`` bool.
    query_mask: ``[B, T]`` bool.
    chunk_size: positions in one chunk of a device.

  Returns:
    ``[B, T, N, V]`` in value's dtype, divided like query.

  Raises:
    ValueError: as `spectral_attention`; an axis that the mesh does not have, or
      whose size does not divide T and S.

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
  arrays = checks.attention_arrays(
    query, key, value, key_mask=key_mask, query_mask=query_mask
  )
  variables = as_variables(variables)
  check_spectral_inputs(arrays, feature_map, variables, stats, is_causal)
  if chunk_size is not None:
    checks.check_positive_int("chunk_size", chunk_size)
  if axis not in mesh.shape:
    raise ValueError(f"axis={axis!r} is not one of the mesh: {mesh.shape}.")
  query, key, value = arrays[:3]
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
  sqrt_scale, factor = checks.split_scale(scale, query.shape[-1])
  query, key = (checks.times_factor(x, factor) for x in (query, key))
  return _sequence_parallel(
    arrays._replace(query=query, key=key),
    (variables, stats),
    _Options(feature_map, sqrt_scale, is_causal, chunk_size, mesh, axis),
  )


class _Options(NamedTuple):
  """The static arguments of the compiled program."""

  feature_map: FeatureMap
  sqrt_scale: float
  is_causal: bool
  chunk_size: int | None
  mesh: Mesh
  axis: str


@functools.partial(jax.jit, static_argnames=("options",))
def _sequence_parallel(
  arrays: AttentionArrays, shared: PyTree, options: _Options
) -> Array:
  """Computes `sequence_parallel_attention` of checked arguments."""
  run = functools.partial(_on_auto_axes, options)
  return meshes.with_auto_axes(run, options.mesh, options.axis, arrays, shared)


def _on_auto_axes(
  options: _Options,
  mesh: Mesh | AbstractMesh | None,
  arrays: AttentionArrays,
  shared: tuple[FeatureVariables, PyTree],
) -> Array:
  """Runs on a mesh without Explicit axes (None: the mesh of the context)."""
  feature_map, sqrt_scale, is_causal, chunk_size, _, axis = options
  variables, stats = shared
  query, key, value, key_mask, query_mask, _ = arrays
  query = with_zeros(query, query_mask)
  key, value = with_zeros(key, key_mask), with_zeros(value, key_mask)
  stats = statistics_of_keys(
    feature_map, variables, stats, key, key_mask, sqrt_scale
  )
  maps = maps_of(feature_map, sqrt_scale)
  groups = query.shape[2] // key.shape[2]

  def on_one_device(
    constants: PyTree, query: Array, key: Array, value: Array, key_mask: Mask
  ) -> Array:
    shape = query.shape
    query = query.reshape(*shape[:2], key.shape[2], groups, shape[3])
    index = jax.lax.axis_index(axis)
    is_signed = not feature_map.info.positive
    empty = start(maps, constants, key, value.shape[3], is_signed)
    inputs = Inputs(query, key, value, key_mask, None)
    empty = empty._replace(length=index * key.shape[1])
    call = Call(maps, chunk_size, constants, empty, inputs, is_causal)
    own = bidirectional.accumulate(call)
    state = _sum_over_devices(own, axis, index if is_causal else None)
    position = index * shape[1]
    if is_causal:
      state = state._replace(length=position)
      out, _ = causal.causal(call._replace(state=state))
    else:
      out = bidirectional.read(call._replace(state=state), position)
    return out.reshape(*shape[:3], -1)

  divided = P(None, axis)
  out = jax.shard_map(
    on_one_device,
    mesh=mesh,
    axis_names={axis},
    in_specs=(P(), divided, divided, divided, divided),
    out_specs=divided,
    # The check would demand a cast of the zeros that sums start from.
    check_vma=False,
  )(feature_map.prepare(variables, stats), query, key, value, key_mask)
  return with_zeros(out, query_mask)


def _sum_over_devices(state: State, axis: str, before: Array | None) -> State:
  """Returns the sums of all devices, or of those before device `before`."""
  kv, total, magnitude, exponent = jax.lax.all_gather(
    (state.kv, state.total, state.magnitude, state.exponent), axis
  )
  is_counted = jnp.ones(exponent.shape[0], bool)
  if before is not None:
    is_counted = jnp.arange(exponent.shape[0]) < before
  is_counted = is_counted[:, None, None, None]
  exponent = jnp.where(is_counted, jax.lax.stop_gradient(exponent), LOWEST)
  largest = jnp.max(exponent, axis=0)
  factor = jnp.where(is_counted, power_of_two(exponent - largest[None]), 0.0)
  total, magnitude = jax.tree.map(
    lambda sums: jnp.sum(sums * factor, axis=0), (total, magnitude)
  )
  return state._replace(
    kv=jnp.sum(kv * factor[..., None], axis=0),
    total=total,
    magnitude=magnitude,
    exponent=largest,
  )
