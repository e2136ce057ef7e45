"""Attention by Pallas kernels: what they can do, and how it is put to them.

Feature map and sums of a chunk are one kernel body, so that query, key and
value are read once and features exist on chip only.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.pallas import chunks as pallas_chunks
from spectraformer_jax.linear_attention.pallas import hoist as pallas_hoist
from spectraformer_jax.linear_attention.pallas import scan as pallas_scan
from spectraformer_jax.linear_attention.pallas.chunks import Sums
from spectraformer_jax.linear_attention.state import Maps, State, with_rest
from spectraformer_jax.typing import Array, PyTree

DTYPES = (jnp.float32, jnp.bfloat16)


@dataclasses.dataclass(frozen=True)
class Kernels:
  """The implementation for one platform.

  Attributes:
    platform: "tpu" or "gpu".
    interpret: as in `pl.pallas_call`, for tests.
    is_elsewhere: programs are compiled for another machine, or interpreted:
      the platform of this one does not matter.
  """

  platform: str
  interpret: Any = False
  is_elsewhere: bool = False

  @property
  def module(self):
    """The kernels; imported here, so that others need not load Pallas."""
    if self.platform == "tpu":
      from spectraformer_jax.linear_attention.pallas import tpu as module
    else:
      from spectraformer_jax.linear_attention.pallas import gpu as module
    return module

  def refuses(
    self,
    maps: Maps,
    constants: PyTree,
    state: State,
    query: Array,
    key: Array,
    value: Array,
    keep: Array | None,
    segment_ids: Any,
    *,
    is_causal: bool,
    chunk: int | None,
  ) -> str | None:
    """See `implementations.Implementation`."""
    del keep
    backend = jax.default_backend()
    if not self.is_elsewhere and backend != self.platform:
      return f"it needs a {self.platform.upper()}, JAX runs on {backend!r}"
    try:
      _ = self.module
    except ImportError as error:
      return f"this version of JAX does not have what it needs ({error})"
    if segment_ids is not None:
      return "it takes no segment_ids"
    if is_causal and query.shape[1] != key.shape[1]:
      return "it takes causal queries and keys of one length"
    if query.shape[3] > 1:
      return "it takes as many query heads as key heads"
    for name, x in (("query", query), ("key", key), ("value", value)):
      if x.dtype not in DTYPES:
        return f"it takes float32 and bfloat16, not {name} of type {x.dtype}"
    if reason := _refuses_maps(maps, constants, key, state):
      return reason
    plan = self._plan(
      maps, constants, state, query, key, value, is_causal, chunk
    )
    return plan if isinstance(plan, str) else None

  def _plan(
    self, maps, constants, state, query, key, value, is_causal, chunk
  ) -> "_Plan | str":
    """How to do it, or why it cannot be done."""
    hoisted = _hoist(maps, constants, query, key, pallas_scan.SMALLEST_CHUNK)
    if isinstance(hoisted, str):
      return hoisted
    for side in (hoisted.query, hoisted.key):
      needed = pallas_hoist.primitives(side.function.eqns)
      if unknown := sorted(needed - self.module.PRIMITIVES):
        return f"its kernels cannot do {unknown}, as the map needs"
    sizes = pallas_scan.Sizes(
      length=max(query.shape[1], key.shape[1]),
      head_dim=query.shape[-1],
      value_dim=value.shape[-1],
      feature_dim=state.kv.shape[2],
      constants=[a.shape[2:] for a in hoisted.constants],
      item_bytes=max(x.dtype.itemsize for x in (query, key, value)),
      is_causal=is_causal,
    )
    tile = self.module.fit(sizes, chunk)
    if isinstance(tile, str):
      return tile
    tiles = sizes.value_dim // tile.value_dim
    hoisted = _hoist(maps, constants, query, key, tile.chunk)
    return _Plan(hoisted, tile.chunk, tiles)

  def run(
    self,
    maps: Maps,
    constants: PyTree,
    state: State,
    query: Array,
    key: Array,
    value: Array,
    keep: Array | None,
    segment_ids: Any,
    *,
    is_causal: bool,
    chunk: int | None,
  ) -> tuple[Array, State]:
    """See `implementations.Implementation`; one kernel if causal, else two."""
    del segment_ids
    plan = self._plan(
      maps, constants, state, query, key, value, is_causal, chunk
    )
    (constants, query_map, key_map), chunk, tiles = plan
    length, num_keys = query.shape[1], key.shape[1]
    if num_keys % chunk and keep is None:
      keep = jnp.ones(key.shape[:2], bool)
    query, key, value = (
      _pad(jnp.swapaxes(x, 1, 2), chunk)
      for x in (query[:, :, :, 0], key, value)
    )
    if keep is not None:
      keep = _pad(keep[:, None, :, None].astype(jnp.float32), chunk)[..., 0]
    # Parts of the values are like more heads, with the same query and key.
    query, key = (jnp.repeat(x, tiles, axis=1) for x in (query, key))
    value = _to_heads(value, 3, tiles)
    constants = [
      jnp.repeat(a, tiles, axis=1) if a.shape[1] > 1 else a for a in constants
    ]
    sums = _to_sums(state, tiles)

    def causal_step(constants, sums, xs, keep):
      sums, out = pallas_chunks.causal_chunk(
        query_map, key_map, constants, sums, *xs, keep
      )
      return sums, [out.astype(value.dtype)]

    def key_step(constants, sums, xs, keep):
      return pallas_chunks.add_keys(key_map, constants, sums, *xs, keep), []

    def query_step(constants, carry, xs, keep):
      del keep
      constants, sums = constants[:-3], Sums(*constants[-3:])
      out = pallas_chunks.read(query_map, constants, sums, *xs)
      return carry, [out.astype(value.dtype)]

    def scan(step, *args, is_linear):
      calls = self.module.Calls(step, chunk, self.interpret)
      return pallas_scan.scan(calls, *args, is_linear=is_linear)

    if is_causal:
      xs = [query, key, value]
      sums, [out] = scan(
        causal_step, constants, sums, xs, keep, is_linear=False
      )
    else:
      xs, empty = [key, value], pallas_chunks.empty_like(sums)
      own, _ = scan(key_step, constants, empty, xs, keep, is_linear=True)
      sums = pallas_chunks.join(sums, own)
      with_sums = constants + list(sums)
      _, [out] = scan(query_step, with_sums, (), [query], None, is_linear=True)
    out = _from_heads(out[:, :, :length], 3, tiles)
    out = jnp.swapaxes(out, 1, 2)[:, :, :, None]
    return out, _from_sums(sums, state, num_keys, tiles)


class _Plan(NamedTuple):
  """How one call is put to the kernels.

  Attributes:
    hoisted: the feature maps, for chunks of that size.
    chunk: C.
    tiles: parts that values are cut into.
  """

  hoisted: pallas_hoist.Hoisted
  chunk: int
  tiles: int


KERNELS = {platform: Kernels(platform) for platform in ("tpu", "gpu")}


def _refuses_maps(maps, constants, key, state: State) -> str | None:
  """Why features of this form are not for the kernels."""
  if state.magnitude is not None:
    return "it takes positive feature maps"
  batch, _, heads, dim = key.shape
  one = jax.ShapeDtypeStruct((batch, heads, 1, dim), key.dtype)
  for feature_map in maps:
    out = jax.eval_shape(feature_map, constants, one, 0)
    if out.log_magnitude is None:
      return "there is no feature map to fuse: it takes no ready-made features"
    if out.factor is not None:
      return "it takes feature maps that are exponentials, without a factor"
  return None


def _hoist(maps, constants, query, key, chunk):
  """The maps for chunks of that size, cut in two; or a reason why not."""
  tokens = (
    jax.ShapeDtypeStruct((chunk, x.shape[-1]), x.dtype) for x in (query, key)
  )
  return pallas_hoist.hoist(maps, constants, *tokens)


def _pad(x: Array, multiple: int) -> Array:
  """Zeros behind ``[B, N, T, K]``, up to a multiple."""
  padding = -x.shape[2] % multiple
  if not padding:
    return x
  return jnp.pad(x, [(0, 0), (0, 0), (0, padding), (0, 0)])


def _to_heads(x: Array, axis: int, tiles: int) -> Array:
  """Cuts an axis of ``[B, N, ...]`` into tiles, one after another in N."""
  batch, heads = x.shape[:2]
  size = x.shape[axis] // tiles
  x = x.reshape(*x.shape[:axis], tiles, size, *x.shape[axis + 1 :])
  x = jnp.moveaxis(x, axis, 2)
  return x.reshape(batch, heads * tiles, *x.shape[3:])


def _from_heads(x: Array, axis: int, tiles: int) -> Array:
  """Takes `_to_heads` back."""
  x = x.reshape(x.shape[0], -1, tiles, *x.shape[2:])
  x = jnp.moveaxis(x, 2, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _to_sums(state: State, tiles: int) -> Sums:
  """Sums ``[B, N, R, F]`` for values in tiles."""
  rows = (state.total[:, :, None], state.exponent[:, :, None])
  return Sums(
    _to_heads(jnp.swapaxes(state.kv, 2, 3), 2, tiles),
    *(jnp.repeat(row, tiles, axis=1) for row in rows),
  )


def _from_sums(sums: Sums, before: State, num_keys: int, tiles: int) -> State:
  """The state after that many more keys."""
  after = before if before.rest is None else with_rest(before)
  return after._replace(
    kv=jnp.swapaxes(_from_heads(sums.kv, 2, tiles), 2, 3),
    total=sums.total[:, ::tiles, 0],
    exponent=sums.exponent[:, ::tiles, 0],
    length=before.length + num_keys,
  )
