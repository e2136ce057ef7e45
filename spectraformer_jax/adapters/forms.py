"""A mask over queries and keys, and a pass over the keys that honours it."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax import checks, meshes
from spectraformer_jax.adapters import mask_forms
from spectraformer_jax.attention import spectral_attention
from spectraformer_jax.typing import Array

if TYPE_CHECKING:
  from spectraformer_jax.adapters.attention_fns import Adapter

_NOT_HONOURED = (
  "mask must say which queries and which keys are real, and may follow the "
  "causal triangle or keep packed rows apart: linear attention cannot honour "
  "another mask over query and key positions. Use is_causal=True for a causal "
  "mask, and spectral_attention(segment_ids=...) for packed rows."
)


def attend(
  adapter: "Adapter",
  query: Array,
  key: Array,
  value: Array,
  mask: Array | None,
  bias: Array | None,
  *,
  is_causal: bool,
  is_bool: bool = False,
  query_lengths: Array | None = None,
  key_lengths: Array | None = None,
  **kwargs,
) -> Array:
  """`spectral_attention` with any batch axes, and a mask over both."""
  batch = query.shape[:-3]
  expected = (*batch, query.shape[-2], query.shape[-3], key.shape[-3])
  seen = sound = None
  if mask is not None:
    seen, sound = mask_forms.read_mask(mask, expected, is_bool=is_bool)
  if bias is not None:
    shown, honest = mask_forms.read_bias(bias, expected)
    seen = shown if seen is None else seen & shown
    sound = honest if sound is None else sound & honest
  query, key, value = (
    x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)
  )
  work = _Work(
    adapter,
    query,
    key,
    value,
    give=_before(query_lengths, query),
    keep=_before(key_lengths, key),
    kwargs=kwargs,
  )
  if work.is_positional and seen is None and work.keep is not None:
    seen, sound = work.keep[:, None, None], True  # says where a query stands
  if seen is None:
    out = work.plain(None, None, is_causal)
  else:
    out, honoured = _honour(work, seen, is_causal)
    honoured = honoured & sound
    if isinstance(honoured, np.ndarray):
      if not honoured.all():
        shape = np.shape(bias if mask is None else mask)
        raise ValueError(f"{_NOT_HONOURED} Got a shape of {shape}.")
    else:
      # A product, so that gradients are NaN as well.
      factor = jnp.where(honoured, 1.0, jnp.nan).astype(out.dtype)
      out = out * factor[:, None, None, None]
  return out.reshape(*batch, *out.shape[1:])


def _before(lengths: Array | None, x: Array) -> Array | None:
  """Bool ``[B, T]``: positions before `lengths` ``[B]``."""
  if lengths is None:
    return None
  return checks.positions_before(jnp.asarray(lengths), x.shape[1])


def _honour(work: "_Work", seen: Array, is_causal: bool):
  """Attention under a mask ``[B or 1, N or 1, T or 1, S]``.

  Returns:
    ``[B, T, N, V]``, and where the mask is honoured, bool ``[B or 1]``; numpy
    where that is known.
  """
  length, num_keys = work.query.shape[1], seen.shape[3]
  same = (seen == seen[:, :1]).all(axis=(1, 2, 3))
  seen = seen[:, 0]
  is_placed = work.is_positional and length != num_keys and not is_causal
  if seen.shape[1] == 1 and not (is_placed and length == 1):
    return work.plain(None, seen[:, 0], is_causal), same
  xp = mask_forms.numbers(seen)
  seen = xp.broadcast_to(seen, (seen.shape[0], length, num_keys))
  if is_causal:
    seen = seen & mask_forms.triangle(length, num_keys)[None]
  if not seen.size:
    return work.plain(None, None, is_causal), same
  if is_placed and length == 1:
    form = mask_forms.placed_form(seen)
    return work.placed(form), same & form.holds
  if xp is np:
    return _honour_known(work, seen, is_causal, same)
  form = mask_forms.product_form(seen, is_causal)
  plain = lambda: work.plain(form.queries, form.keys, is_causal)
  others = work.others(is_causal and length == num_keys)
  if not others:
    return plain(), same & form.holds
  take, attend = others[0]

  def other():
    found = take(seen)
    return attend(found), found.holds

  # Kept apart in memory as well: what `other` needs is made again.
  out, holds = jax.lax.cond(
    form.holds.all(), lambda: (plain(), form.holds), jax.checkpoint(other)
  )
  return out, same & holds


def _honour_known(work, seen, is_causal, same):
  """`_honour` of a mask ``[B or 1, T, S]`` whose content is known."""
  is_square = seen.shape[1] == seen.shape[2]
  for triangle in dict.fromkeys((is_causal, is_square)):
    if triangle and not work.can_be_causal:
      continue
    form = mask_forms.product_form(seen, triangle)
    if form.holds.all():
      return work.plain(form.queries, form.keys, triangle), same
  for take, attend in work.others(is_square):
    form = take(seen)
    if form.holds.all():
      return attend(form), same
  return work.plain(None, None, False), same & form.holds


@dataclasses.dataclass(frozen=True)
class _Work:
  """One call: what is attended, with the ways to attend it.

  Attributes:
    adapter: whose feature map it is.
    query: ``[B, T, N G, H]``.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    give: bool ``[B, T]`` or None: queries that lengths leave.
    keep: bool ``[B, S]`` or None: keys, likewise.
    kwargs: others of `spectral_attention`.
  """

  adapter: "Adapter"
  query: Array
  key: Array
  value: Array
  give: Array | None
  keep: Array | None
  kwargs: dict[str, Any]

  @property
  def is_positional(self) -> bool:
    """Whether features depend on where a token stands."""
    return self.adapter.feature_map.component.info.positional

  @property
  def can_be_causal(self) -> bool:
    """Whether no statistics of the whole sequence are needed."""
    adapter = self.adapter
    return adapter.stats is not None or not adapter.feature_map.info.needs_stats

  def others(self, is_square_and_causal):
    """Forms of masks beyond products, each with the way to attend it."""
    if not self.can_be_causal:
      return []
    if self.is_positional:
      return [(mask_forms.placed_form, self.placed)]
    segments = [(mask_forms.segment_form, self.packed)]
    chains = [(mask_forms.chain_form, self.in_order)]
    return segments * is_square_and_causal + chains

  def attend(self, query, key, value, queries, keys, **kwargs):
    """`spectral_attention`; masks are None, or ``[B or 1, length]``."""
    return spectral_attention(
      query,
      key,
      value,
      feature_map=self.adapter.feature_map,
      variables=self.adapter.variables,
      stats=self.adapter.stats,
      query_mask=queries,
      key_mask=keys,
      **kwargs,
      **self.kwargs,
    )

  def masks(self, queries, keys):
    """Those of a mask and of lengths together, ``[B, length]`` or None."""
    return (
      _both(queries, self.give, self.query),
      _both(keys, self.keep, self.key),
    )

  def plain(self, queries, keys, is_causal):
    """Real queries see real keys, within the triangle if asked."""
    queries, keys = self.masks(queries, keys)
    key, value = self.key, self.value
    more = self.query.shape[1] - key.shape[1]
    if is_causal and more < 0:  # nobody sees the keys from T on
      key, value = key[:, :more], value[:, :more]
      keys = None if keys is None else keys[:, :more]
    elif is_causal and more > 0:  # queries from S on see all
      if keys is None:
        keys = jnp.ones(key.shape[:2], bool)
      key, value, keys = (_padded(x, after=more) for x in (key, value, keys))
    return self.attend(
      self.query, key, value, queries, keys, is_causal=is_causal
    )

  def in_order(self, form):
    """See `_in_order`."""
    return self._on_shards(_Work._in_order, form)

  def placed(self, form):
    """See `_placed`."""
    return self._on_shards(_Work._placed, form)

  def _on_shards(self, method, form):
    """Attends the examples and heads of each device of an Explicit mesh."""

    def on_one_device(query, key, value, variables, stats, masks):
      own, give, keep = masks
      adapter = dataclasses.replace(
        self.adapter, variables=variables, stats=stats
      )
      work = _Work(adapter, query, key, value, give, keep, self.kwargs)
      return method(work, own), ()

    return meshes.on_shards(
      on_one_device,
      self.query,
      self.key,
      self.value,
      by_head=self.adapter.variables,
      by_row=self.adapter.stats,
      by_example=(form, self.give, self.keep),
    )[0]

  def packed(self, form):
    """Causal attention of packed rows."""
    queries, keys = self.masks(form.queries, form.keys)
    ids = jnp.broadcast_to(form.of_query, self.query.shape[:2])
    return self.attend(
      self.query,
      self.key,
      self.value,
      queries,
      keys,
      is_causal=True,
      segment_ids=ids,
    )

  def _in_order(self, form):
    """All positions in one row: by group, then rank, keys before queries."""
    length, num_keys = self.query.shape[1], self.key.shape[1]
    queries, keys = self.masks(form.queries, form.keys)
    both = lambda of_key, of_query: jnp.broadcast_to(
      jnp.concatenate([of_key, of_query], axis=1),
      (self.query.shape[0], num_keys + length),
    )
    ids = both(form.of_key, form.of_query)
    rank = both(form.rank_of_key, form.rank_of_query)
    kind = jnp.zeros_like(ids) + jnp.arange(num_keys + length)[None]
    order = jnp.lexsort((kind, rank, ids), axis=1)
    place = jnp.argsort(order, axis=1)[:, num_keys:]
    query, key, value, queries, keys, ids = (
      _take(x, order)
      for x in (
        _padded(self.query, before=num_keys),
        _padded(self.key, after=length),
        _padded(self.value, after=length),
        _padded(queries, before=num_keys),
        _padded(keys, after=length),
        ids,
      )
    )
    out = self.attend(
      query, key, value, queries, keys, is_causal=True, segment_ids=ids
    )
    return _take(out, place)

  def _placed(self, form):
    """Queries among the keys, where they stand."""
    queries, keys = self.masks(form.queries, form.keys)
    place = jnp.broadcast_to(form.rank_of_query, self.query.shape[:2])
    here = place[:, None] == jnp.arange(self.key.shape[1])[None, :, None]
    here = here & queries[:, None]
    which = here.argmax(axis=2)
    out = self.attend(
      _take(self.query, which),
      self.key,
      self.value,
      here.any(axis=2),
      keys,
      is_causal=True,
    )
    out = _take(out, place)
    return jnp.where(queries[:, :, None, None], out, 0)


def _both(mask: Array | None, other: Array | None, x: Array) -> Array | None:
  """The masks together, ``[B, length]`` of x."""
  if mask is None or other is None:
    mask = other if mask is None else mask
  else:
    mask = mask & other
  return None if mask is None else jnp.broadcast_to(mask, x.shape[:2])


def _padded(x: Array, before: int = 0, after: int = 0) -> Array:
  """Zeros (False) before and after on axis 1."""
  return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def _take(x: Array, order: Array) -> Array:
  """Positions of axis 1 in another order, per example."""
  return jnp.take_along_axis(
    x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1
  )
