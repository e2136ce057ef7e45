"""Attention by Pallas kernels: what they can do, and how it is put to them.

Feature map and sums of a chunk are one kernel body, so that query, key and
value are read once and features exist on chip only.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention import (
  pallas_chunks,
  pallas_hoist,
  pallas_scan,
)
from spectraformer_jax.linear_attention.fused import Maps
from spectraformer_jax.linear_attention.pallas_chunks import Sums
from spectraformer_jax.linear_attention.state import State
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
      from spectraformer_jax.linear_attention import pallas_tpu as module
    else:
      from spectraformer_jax.linear_attention import pallas_gpu as module
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
    """See `api.Implementation`."""
    del keep
    backend = jax.default_backend()
    if not self.is_elsewhere and backend != self.platform:
      return f"it needs a {self.platform.upper()}, JAX runs on {backend!r}"
    if segment_ids is not None:
      return "it takes no segment_ids"
    if query.shape[3] > 1:
      return "it takes as many query heads as key heads"
    for name, x in (("query", query), ("key", key), ("value", value)):
      if x.dtype not in DTYPES:
        return f"it takes float32 and bfloat16, not {name} of type {x.dtype}"
    if reason := _refuses_maps(maps, constants, key, state):
      return reason
    chunk = self.module.chunk_size(
      chunk, query.shape[1], key.shape[1], is_causal
    )
    hoisted = _hoist(maps, constants, query, key, chunk)
    for side in hoisted:
      if isinstance(side, str):
        return side
      unknown = (
        pallas_hoist.primitives(side.per_token.eqns) - self.module.PRIMITIVES
      )
      if unknown:
        return f"its kernels cannot do {sorted(unknown)}, as the map needs"
    shapes = [a.shape[2:] for side in hoisted for a in side.constants]
    return self.module.too_big(
      pallas_scan.Sizes(
        chunk=chunk,
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        feature_dim=state.kv.shape[2],
        constants=shapes,
        item_bytes=max(x.dtype.itemsize for x in (query, key, value)),
        is_causal=is_causal,
      )
    )

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
    """See `api.Implementation`; one kernel if causal, else two."""
    del segment_ids
    length, num_keys = query.shape[1], key.shape[1]
    chunk = self.module.chunk_size(chunk, length, num_keys, is_causal)
    query_map, key_map = _hoist(maps, constants, query, key, chunk)
    if num_keys % chunk and keep is None:
      keep = jnp.ones(key.shape[:2], bool)
    query, key, value = (
      _pad(jnp.swapaxes(x, 1, 2), chunk)
      for x in (query[:, :, :, 0], key, value)
    )
    if keep is not None:
      keep = _pad(keep[:, None, :, None].astype(jnp.float32), chunk)[..., 0]
    sums = _to_sums(state)
    of_query = len(query_map.constants)

    def causal_step(constants, sums, xs, keep):
      split = constants[:of_query], constants[of_query:]
      sums, out = pallas_chunks.causal_chunk(
        query_map, key_map, *split, sums, *xs, keep
      )
      return sums, [out.astype(value.dtype)]

    def key_step(constants, sums, xs, keep):
      return pallas_chunks.add_keys(key_map, constants, sums, *xs, keep), []

    def query_step(constants, carry, xs, keep):
      del keep
      sums = Sums(*constants[of_query:])
      out = pallas_chunks.read(query_map, constants[:of_query], sums, *xs)
      return carry, [out.astype(value.dtype)]

    def scan(step, *args, is_linear):
      calls = self.module.Calls(step, chunk, self.interpret)
      return pallas_scan.scan(calls, *args, is_linear=is_linear)

    if is_causal:
      maps_constants = query_map.constants + key_map.constants
      xs = [query, key, value]
      sums, [out] = scan(
        causal_step, maps_constants, sums, xs, keep, is_linear=False
      )
    else:
      xs = [key, value]
      sums, _ = scan(
        key_step, key_map.constants, sums, xs, keep, is_linear=True
      )
      with_sums = query_map.constants + list(sums)
      _, [out] = scan(query_step, with_sums, (), [query], None, is_linear=True)
    out = jnp.swapaxes(out[:, :, :length], 1, 2)[:, :, :, None]
    return out, _from_sums(sums, state, num_keys)


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
  """Both maps for chunks of that size, cut in two; or a reason why not."""
  return [
    pallas_hoist.hoist(
      feature_map,
      constants,
      jax.ShapeDtypeStruct((chunk, x.shape[-1]), x.dtype),
    )
    for feature_map, x in zip(maps, (query, key), strict=True)
  ]


def _pad(x: Array, multiple: int) -> Array:
  """Zeros behind ``[B, N, T, K]``, up to a multiple."""
  padding = -x.shape[2] % multiple
  if not padding:
    return x
  return jnp.pad(x, [(0, 0), (0, 0), (0, padding), (0, 0)])


def _to_sums(state: State) -> Sums:
  """Sums ``[B, N, R, F]``."""
  return Sums(
    jnp.swapaxes(state.kv, 2, 3),
    state.total[:, :, None],
    state.exponent[:, :, None],
  )


def _from_sums(sums: Sums, before: State, num_keys: int) -> State:
  """The state after that many more keys."""
  return before._replace(
    kv=jnp.swapaxes(sums.kv, 2, 3),
    total=sums.total[:, :, 0],
    exponent=sums.exponent[:, :, 0],
    length=before.length + num_keys,
  )
