"""Hybrid attention as its definition says, with a T x S matrix of weights."""

import math

import jax
import jax.numpy as jnp

from spectraformer_jax.hybrid_attention.layout import Row, Setting
from spectraformer_jax.hybrid_attention.parts import Part, divide_parts
from spectraformer_jax.hybrid_attention.scores import BlockKeys, exact_part
from spectraformer_jax.linear_attention.exponents import (
  SMALLEST_NORMALIZER,
  whole_exponent,
)
from spectraformer_jax.linear_attention.inputs import Maps
from spectraformer_jax.linear_attention.reference import scale_features
from spectraformer_jax.linear_attention.state import (
  State,
  join_sums,
  split_sums,
)
from spectraformer_jax.linear_attention.xla import chunks
from spectraformer_jax.linear_attention.xla.blocks import Keys
from spectraformer_jax.linear_attention.xla.chunks import Engine
from spectraformer_jax.linear_attention.xla.products import EXACT
from spectraformer_jax.typing import Array, PyTree


def attend(
  maps: Maps, setting: Setting, constants: PyTree, state: State, row: Row
) -> tuple[Array, State]:
  """Attends, with all weights in memory; arguments as in `xla.attend`."""
  exact, (_, length, _, _, _) = setting.exact, row.query.shape
  query = jnp.moveaxis(row.query, 1, 3)
  key, value, key_mask = (
    jnp.swapaxes(x, 1, 2) for x in (row.key, row.value, row.mask_by_head())
  )
  # Place of each key among the queries.
  place = jnp.arange(key.shape[2]) - exact.left
  offset = (jnp.arange(length)[:, None] - place[None])[None, None, None]
  is_visible = key_mask[:, :, None, None]
  if setting.is_causal:
    is_visible &= offset >= 0
  if row.segment is not None:
    own = row.segment[:, exact.left : exact.left + length]
    same = own[:, :, None] == row.segment[:, None]
    is_visible &= same[:, None, None]
  is_near = exact.is_near(offset)
  near = BlockKeys(key, value, is_visible & is_near)
  exact_sums = exact_part(
    setting, EXACT, query, _special(setting, row, length), near
  )
  is_far = is_visible & ~is_near
  far = _far_part(
    maps, constants, state, query, near._replace(is_visible=is_far)
  )
  out = divide_parts(exact_sums, [far], setting.num_rows).out
  return (
    jnp.moveaxis(out, 3, 1).astype(value.dtype),
    _state_after(maps, constants, state, row, exact.left, length),
  )


def _special(setting: Setting, row: Row, length: int) -> BlockKeys:
  """Returns sinks and heavy keys, and which queries see them."""
  key, value, position = row.special
  if row.segment is not None:
    key, value, position = (jnp.swapaxes(x, 1, 2) for x in row.special)
    return BlockKeys(key, value, position[:, :, None] == 0.0)
  last = (
    jnp.arange(length, dtype=jnp.float32)[None, None, None, :, None]
    if setting.is_causal
    else length + row.key.shape[1]
  )
  return BlockKeys(key, value, position[:, :, None, None] <= last)


def _far_part(
  maps: Maps,
  constants: PyTree,
  state: State,
  query: Array,
  keys: BlockKeys,
) -> Part:
  """Returns sums of features over visible keys and over the state's keys."""
  map_groups = jax.vmap(maps.query, in_axes=(None, 2, None), out_axes=2)
  zero = jnp.zeros((), jnp.int32)
  phi, psi, state_factor, log_factor = scale_features(
    map_groups(constants, query, zero),
    maps.key(constants, keys.key, zero),
    jnp.any(keys.is_visible, (2, 3)),
    state,
    None,
  )
  value = chunks.with_ones(keys.value)

  def sums_of(phi: Array, psi: Array, value: Array) -> Array:
    weights = jnp.einsum("bngtf,bnsf->bngts", phi, psi, precision="highest")
    weights = jnp.where(keys.is_visible, weights, 0.0)
    return jnp.einsum("bngts,bnsv->bngtv", weights, value, precision="highest")

  def of_state(phi: Array, sums: Array) -> Array:
    return jnp.einsum(
      "bngtf,bnfv->bngtv",
      phi,
      sums * state_factor[..., None],
      precision="highest",
    )

  sums = sums_of(phi, psi, value) + of_state(phi, join_sums(state).sums)
  magnitude = None
  if state.magnitude is not None:
    magnitude = sums_of(jnp.abs(phi), jnp.abs(psi), value[..., -1:])
    magnitude += of_state(jnp.abs(phi), state.magnitude[..., None])
  else:
    # As in the passes of `xla`: NaN for weights that have underflowed.
    sees_keys = jnp.any(keys.is_visible, axis=-1, keepdims=True)
    is_lost = sees_keys & (sums[..., -1:] < SMALLEST_NORMALIZER)
    sums = jnp.where(is_lost, jnp.nan, sums)
  exponent = whole_exponent(log_factor)
  rest = jnp.exp(log_factor - exponent * math.log(2.0))
  magnitude = None if magnitude is None else magnitude * rest
  return Part(sums * rest, magnitude, exponent)


def _state_after(
  maps: Maps, constants: PyTree, state: State, row: Row, left: int, length: int
) -> State:
  """Returns the sums after all keys but those that the window keeps."""
  end = row.key.shape[1] - left
  key, value, key_mask = (
    jnp.swapaxes(x[:, :end], 1, 2)
    for x in (row.key, row.value, row.mask_by_head())
  )
  keys = Keys(key, value, key_mask[..., None], jnp.zeros((), jnp.int32))
  engine = Engine(maps, EXACT, chunk_size=end)
  after = chunks.add_keys(engine, constants, join_sums(state), keys)
  return split_sums(after._replace(length=state.length + length))
