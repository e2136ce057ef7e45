"""Attention by Pallas kernels: which calls they take, and in which form.

One kernel body computes the features and the sums of a chunk, so that query,
key and value are read once and features exist on chip only.
"""

import dataclasses
import functools
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.inputs import Call
from spectraformer_jax.linear_attention.pallas import bodies, hoist, scan
from spectraformer_jax.linear_attention.pallas.bodies import HeadState
from spectraformer_jax.linear_attention.platforms import current_platform
from spectraformer_jax.linear_attention.state import State, with_rest
from spectraformer_jax.typing import Array, PyTree

DTYPES = (jnp.float32, jnp.bfloat16)


class _Plan(NamedTuple):
  """How one call is passed to the kernels.

  Attributes:
    hoisted: the feature maps, for chunks of `chunk_size`.
    chunk_size: C.
    num_parts: number of parts that the axis V of values is cut into.
  """

  hoisted: hoist.Hoisted
  chunk_size: int
  num_parts: int


@dataclasses.dataclass(frozen=True)
class Kernels:
  """The implementation for one platform.

  Attributes:
    platform: "tpu" or "gpu".
    interpret: see `pl.pallas_call`; interpreted kernels run on any platform.
  """

  platform: str
  interpret: Any = False

  @property
  def module(self) -> ModuleType:
    """The kernels; imported here, so that other platforms do not load them."""
    if self.platform == "tpu":
      from spectraformer_jax.linear_attention.pallas import tpu as module
    else:
      from spectraformer_jax.linear_attention.pallas import gpu as module
    return module

  def refuses(self, call: Call) -> str | None:
    """Returns why `run` cannot take these arguments; None if it can."""
    query, key, value, _, segment_ids = call.inputs
    platform = current_platform()
    if not self.interpret and platform != self.platform:
      return f"it needs a {self.platform.upper()}, JAX runs on {platform!r}"
    try:
      _ = self.module
    except ImportError as error:
      return f"this version of JAX does not have what it needs ({error})"
    if segment_ids is not None:
      return "it takes no segment_ids"
    if call.is_causal and query.shape[1] != key.shape[1]:
      return "it takes causal queries and keys of one length"
    if query.shape[3] > 1:
      return "it takes as many query heads as key heads"
    for name, x in (("query", query), ("key", key), ("value", value)):
      if x.dtype not in DTYPES:
        return f"it takes float32 and bfloat16, not {name} of type {x.dtype}"
    if reason := _refuses_maps(call):
      return reason
    plan = self._plan(call)
    return plan if isinstance(plan, str) else None

  def _plan(self, call: Call) -> _Plan | str:
    """Returns sizes and feature maps for the kernels, or why there are none."""
    query, key, value, *_ = call.inputs
    hoisted = _hoist(call, scan.SMALLEST_CHUNK)
    if isinstance(hoisted, str):
      return hoisted
    for side in (hoisted.query, hoisted.key):
      needed = hoist.primitives(side.function.eqns)
      if unknown := sorted(needed - self.module.PRIMITIVES):
        return f"its kernels cannot do {unknown}, as the map needs"
    sizes = scan.Sizes(
      length=max(query.shape[1], key.shape[1]),
      head_dim=query.shape[-1],
      value_dim=value.shape[-1],
      feature_dim=call.state.kv.shape[2],
      constants=[a.shape[2:] for a in hoisted.constants],
      item_bytes=max(x.dtype.itemsize for x in (query, key, value)),
      is_causal=call.is_causal,
    )
    tile = self.module.fit(sizes, call.chunk_size)
    if isinstance(tile, str):
      return tile
    hoisted = _hoist(call, tile.chunk_size)
    if isinstance(hoisted, str):
      return hoisted
    num_parts = sizes.value_dim // tile.value_dim
    return _Plan(hoisted, tile.chunk_size, num_parts)

  def run(self, call: Call) -> tuple[Array, State]:
    """Attends, by one kernel if causal, else by two; see `Implementation`."""
    plan = self._plan(call)
    if isinstance(plan, str):
      raise ValueError(plan)
    (constants, query_map, key_map), chunk_size, parts = plan
    query, key, value, mask, _ = call.inputs
    length, num_keys = query.shape[1], key.shape[1]
    if num_keys % chunk_size and mask is None:
      mask = jnp.ones(key.shape[:2], bool)
    query, key, value = (
      _pad(jnp.swapaxes(x, 1, 2), chunk_size)
      for x in (query[:, :, :, 0], key, value)
    )
    if mask is not None:
      mask = mask[:, None, :, None].astype(jnp.float32)
      mask = _pad(mask, chunk_size)[..., 0]
    # Each part of the values becomes a head, with the same query and key.
    query, key = (jnp.repeat(x, parts, axis=1) for x in (query, key))
    value = _to_heads(value, 3, parts)
    constants = [
      jnp.repeat(a, parts, axis=1) if a.shape[1] > 1 else a for a in constants
    ]
    sums = _to_heads_state(call.state, parts)

    def run_scan(step: scan.Step, is_linear: bool, *inputs: PyTree) -> tuple:
      calls = self.module.Calls(step, chunk_size, self.interpret)
      inputs = scan.ForwardInputs(*inputs)
      return scan.scan(calls, inputs, is_linear=is_linear)

    dtype, partial = value.dtype, functools.partial
    if call.is_causal:
      step = partial(bodies.causal_step, query_map, key_map, dtype)
      xs = [query, key, value]
      sums, [out] = run_scan(step, False, constants, sums, xs, mask)
    else:
      step, xs = partial(bodies.key_step, key_map), [key, value]
      empty = bodies.empty_like(sums)
      # The first carry of a linear scan takes no gradient: the sums before the
      # call are added afterwards.
      own, _ = run_scan(step, True, constants, empty, xs, mask)
      sums = bodies.join(sums, own)
      step = partial(bodies.query_step, query_map, dtype)
      _, [out] = run_scan(step, True, [*constants, *sums], (), [query], None)
    out = _from_heads(out[:, :, :length], 3, parts)
    out = jnp.swapaxes(out, 1, 2)[:, :, :, None]
    return out, _from_heads_state(sums, call.state, num_keys, parts)


KERNELS = {platform: Kernels(platform) for platform in ("tpu", "gpu")}


def _refuses_maps(call: Call) -> str | None:
  """Returns why the kernels cannot take features of this form."""
  if call.state.magnitude is not None:
    return "it takes positive feature maps"
  key = call.inputs.key
  batch, _, heads, head_dim = key.shape
  token = jax.ShapeDtypeStruct((batch, heads, 1, head_dim), key.dtype)
  for feature_map in call.maps:
    features = jax.eval_shape(feature_map, call.constants, token, 0)
    if features.log_magnitude is None:
      return "there is no feature map to fuse: it takes no ready-made features"
    if features.factor is not None:
      return "it takes feature maps that are exponentials, without a factor"
  return None


def _hoist(call: Call, chunk_size: int) -> hoist.Hoisted | str:
  """Cuts the maps in two, for chunks of a size, or returns why it cannot."""
  query, key = (
    jax.ShapeDtypeStruct((chunk_size, x.shape[-1]), x.dtype)
    for x in call.inputs[:2]
  )
  return hoist.hoist(call.maps, call.constants, query, key)


def _pad(x: Array, multiple: int) -> Array:
  """Appends zeros to ``[B, N, T, K]``, until `multiple` divides T."""
  padding = -x.shape[2] % multiple
  return jnp.pad(x, [(0, 0), (0, 0), (0, padding), (0, 0)]) if padding else x


def _to_heads(x: Array, axis: int, parts: int) -> Array:
  """Cuts an axis of ``[B, N, ...]`` into parts, as neighbours on axis N."""
  batch, heads = x.shape[:2]
  size = x.shape[axis] // parts
  x = x.reshape(*x.shape[:axis], parts, size, *x.shape[axis + 1 :])
  x = jnp.moveaxis(x, axis, 2)
  return x.reshape(batch, heads * parts, *x.shape[3:])


def _from_heads(x: Array, axis: int, parts: int) -> Array:
  """Undoes `_to_heads`."""
  x = x.reshape(x.shape[0], -1, parts, *x.shape[2:])
  x = jnp.moveaxis(x, 2, axis)
  return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])


def _to_heads_state(state: State, parts: int) -> HeadState:
  """Returns the sums of each head, for values in parts."""
  rows = (state.total[:, :, None], state.exponent[:, :, None])
  return HeadState(
    _to_heads(jnp.swapaxes(state.kv, 2, 3), 2, parts),
    *(jnp.repeat(row, parts, axis=1) for row in rows),
  )


def _from_heads_state(
  sums: HeadState, before: State, num_keys: int, parts: int
) -> State:
  """Returns the state after `num_keys` more keys; any `rest` becomes zero."""
  after = before if before.rest is None else with_rest(before)
  return after._replace(
    kv=jnp.swapaxes(_from_heads(sums.kv, 2, parts), 2, 3),
    total=sums.total[:, ::parts, 0],
    exponent=sums.exponent[:, ::parts, 0],
    length=before.length + num_keys,
  )
