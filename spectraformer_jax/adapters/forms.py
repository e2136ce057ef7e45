"""Attention under a mask over queries and keys, by one pass over the keys."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from spectraformer_jax import checks, meshes
from spectraformer_jax.adapters import mask_forms
from spectraformer_jax.adapters.mask_forms import Form, MaskArray
from spectraformer_jax.adapters.record import Adapter
from spectraformer_jax.attention import spectral_attention
from spectraformer_jax.typing import Array, FeatureVariables, PyTree

_NOT_HONOURED = (
  "mask must say which queries and which keys are real, and may follow the "
  "causal triangle or keep packed rows apart: linear attention cannot honour "
  "another mask over query and key positions. Use is_causal=True for a causal "
  "mask, and spectral_attention(segment_ids=...) for packed rows."
)


def attend(
  adapter: Adapter,
  query: Array,
  key: Array,
  value: Array,
  mask: ArrayLike | None,
  bias: ArrayLike | None,
  *,
  is_causal: bool,
  must_be_bool: bool = False,
  query_lengths: Array | None = None,
  key_lengths: Array | None = None,
  **options: Any,
) -> Array:
  """Calls `spectral_attention`, with any batch axes, under a mask ``[T, S]``.

  Args:
    adapter: holds the feature map, its variables and stats.
    query: ``[batch..., T, N G, H]``.
    key: ``[batch..., S, N, H]``.
    value: ``[batch..., S, N, V]``.
    mask: broadcast against ``[batch..., N G, T, S]``; None for all True.
    bias: another mask, 0 where a key is seen and -inf where not; a query sees
      the keys that both masks let it see.
    is_causal: query i sees keys 0..i, within the mask.
    must_be_bool: refuses masks of numbers.
    query_lengths: ``[B]`` ints: later queries give zeros.
    key_lengths: ``[B]`` ints: no query sees later keys.
    **options: other arguments of `spectral_attention`.

  Returns:
    ``[batch..., T, N G, V]``; NaN for examples whose mask is not honoured.

  Raises:
    ValueError: a mask that is known and cannot be honoured.
  """
  num_queries, num_keys = query.shape[-3], key.shape[-3]
  if adapter.exact.window is not None and not is_causal:
    if num_queries != num_keys:
      raise ValueError(
        f"window={adapter.exact.window} cannot be honoured for {num_queries} "
        f"queries and {num_keys} keys, as with a cache: their positions are "
        "not known; leave window out, or decode with sf.decode_step."
      )
  batch = query.shape[:-3]
  shape = (*batch, query.shape[-2], query.shape[-3], key.shape[-3])
  visible, is_valid = None, np.ones(1, bool)
  if mask is not None:
    visible, is_valid = mask_forms.read_mask(
      mask, shape, must_be_bool=must_be_bool
    )
  if bias is not None:
    seen_under_bias, is_mask = mask_forms.read_bias(bias, shape)
    visible = seen_under_bias if visible is None else visible & seen_under_bias
    is_valid = is_valid & is_mask
  query, key, value = (
    x.reshape(math.prod(batch), *x.shape[-3:]) for x in (query, key, value)
  )
  call = _Call(
    adapter,
    query,
    key,
    value,
    _mask_before(query_lengths, query),
    _mask_before(key_lengths, key),
    options,
  )
  if call.is_positional and visible is None and call.key_mask is not None:
    # Features depend on positions: turn the lengths into a mask, because a
    # single query stands at the last key that its mask lets it see.
    visible = call.key_mask[:, None, None]
  if visible is None:
    out = call.attend_product(None, None, is_causal)
  else:
    out, is_honoured = _attend_masked(call, visible, is_causal)
    is_honoured = is_honoured & is_valid
    if not isinstance(is_honoured, np.ndarray):
      # Multiply instead of choosing values: that makes gradients NaN, too.
      factor = jnp.where(is_honoured, 1.0, jnp.nan).astype(out.dtype)
      out = out * factor[:, None, None, None]
    elif not is_honoured.all():
      shapes = [np.shape(x) for x in (mask, bias) if x is not None]
      raise ValueError(f"{_NOT_HONOURED} Got a shape of {shapes[0]}.")
  return out.reshape(*batch, *out.shape[1:])


def _mask_before(lengths: Array | None, x: Array) -> Array | None:
  """Returns bool ``[B, T]``, True before `lengths` ``[B]``; None for None."""
  if lengths is None:
    return None
  return checks.positions_before(jnp.asarray(lengths), x.shape[1])


def _attend_masked(
  call: "_Call", visible: MaskArray, is_causal: bool
) -> tuple[Array, MaskArray]:
  """Attends under a mask ``[B or 1, N or 1, T or 1, S]``.

  Returns:
    ``[B, T, N G, V]``, and bool ``[B or 1]``, whether the mask is honoured: a
    NumPy array if that is known.
  """
  length, num_keys = call.query.shape[1], visible.shape[3]
  is_for_all_heads = (visible == visible[:, :1]).all(axis=(1, 2, 3))
  visible = visible[:, 0]
  # If features depend on positions, the mask of a single query over the keys of
  # a cache also says at which key the query stands.
  is_in_cache = call.is_positional and length == 1 != num_keys and not is_causal
  if visible.shape[1] == 1 and not is_in_cache:
    out = call.attend_product(None, visible[:, 0], is_causal)
    return out, is_for_all_heads
  xp = mask_forms.module_of(visible)
  visible = xp.broadcast_to(visible, (visible.shape[0], length, num_keys))
  if is_causal:
    visible = visible & mask_forms.triangle(length, num_keys)[None]
  if not visible.size:
    return call.attend_product(None, None, is_causal), is_for_all_heads
  if is_in_cache:
    form = mask_forms.position_form(visible)
    out, matches = call.attend_positions(form), form.matches
  elif xp is np:
    out, matches = _attend_known(call, visible, is_causal)
  else:
    out, matches = _attend_unknown(call, visible, is_causal)
  return out, is_for_all_heads & matches


def _attend_known(
  call: "_Call", visible: MaskArray, is_causal: bool
) -> tuple[Array, MaskArray]:
  """Attends under a mask ``[B or 1, T, S]``, by the first form that fits it."""
  is_square = visible.shape[1] == visible.shape[2]
  # Try the call's `is_causal` first. A square mask may be causal although the
  # call is not; any other mask may need no triangle although the call has one.
  for has_triangle in dict.fromkeys((is_causal, is_square)):
    if has_triangle and not call.can_be_causal:
      continue
    form = mask_forms.product_form(visible, has_triangle)
    if form.matches.all():
      out = call.attend_product(form.query_mask, form.key_mask, has_triangle)
      return out, form.matches
  for find_form, attend_form in call.other_forms(is_square, is_square):
    form = find_form(visible)
    if form.matches.all():
      return attend_form(form), form.matches
  # No form fits: the caller refuses the mask and ignores this output.
  return call.attend_product(None, None, False), np.zeros(1, bool)


def _attend_unknown(
  call: "_Call", visible: MaskArray, is_causal: bool
) -> tuple[Array, MaskArray]:
  """Attends under a mask ``[B or 1, T, S]``: a product, or else one form."""
  form = mask_forms.product_form(visible, is_causal)

  def attend_product() -> tuple[Array, MaskArray]:
    out = call.attend_product(form.query_mask, form.key_mask, is_causal)
    return out, form.matches

  is_square = visible.shape[1] == visible.shape[2]
  others = call.other_forms(
    is_causal and is_square, is_square and not is_causal
  )
  if not others:
    return attend_product()
  find_form, attend_form = others[0]

  # Recompute this branch in the backward pass. Otherwise memory would be needed
  # for the values of both branches, although only one of them runs.
  @jax.checkpoint
  def attend_other() -> tuple[Array, MaskArray]:
    form = find_form(visible)
    return attend_form(form), form.matches

  return jax.lax.cond(form.matches.all(), attend_product, attend_other)


@dataclasses.dataclass(frozen=True)
class _Call:
  """One call of an adapter, and the ways to attend under each form of mask.

  Attributes:
    adapter: holds the feature map, its variables and stats.
    query: ``[B, T, N G, H]``.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    query_mask: bool ``[B, T]``, False where queries give zeros; None for all
      True.
    key_mask: bool ``[B, S]``, True where a key may be seen; None for all.
    options: other arguments of `spectral_attention`.
  """

  adapter: Adapter
  query: Array
  key: Array
  value: Array
  query_mask: MaskArray
  key_mask: MaskArray
  options: dict[str, Any]

  @property
  def is_positional(self) -> bool:
    """Whether features depend on the position of a token."""
    return self.adapter.feature_map.component.info.positional

  @property
  def can_be_causal(self) -> bool:
    """Whether features and exact keys do not depend on the whole sequence."""
    adapter = self.adapter
    if adapter.exact.num_heavy:
      return False
    return adapter.stats is not None or not adapter.feature_map.info.needs_stats

  def other_forms(
    self, try_causal_rows: bool, try_rows: bool
  ) -> list[tuple[Callable[[MaskArray], Form], Callable[[Form], Array]]]:
    """Lists, for forms that are no products, how to find them and attend.

    Args:
      try_causal_rows: whether to look for packed rows under the triangle.
      try_rows: with a window, whether to look for packed rows without triangle.
        Without a window, chains include them.
    """
    if not self.can_be_causal:
      return []
    if self.is_positional:
      return [(mask_forms.position_form, self.attend_positions)]
    has_window = self.adapter.exact.window is not None
    forms = [
      (
        functools.partial(mask_forms.segment_form, is_causal=is_causal),
        functools.partial(self.attend_segments, is_causal=is_causal),
      )
      for is_causal, is_tried in (
        (True, try_causal_rows),
        (False, try_rows and has_window),
      )
      if is_tried
    ]
    if has_window:  # a chain is sorted, so keys leave their positions
      return forms
    return [*forms, (mask_forms.chain_form, self.attend_chain)]

  def run(self, is_causal: bool, segment_ids: Array | None = None) -> Array:
    """Attends under `query_mask` and `key_mask`."""
    return spectral_attention(
      self.query,
      self.key,
      self.value,
      feature_map=self.adapter.feature_map,
      variables=self.adapter.variables,
      stats=self.adapter.stats,
      **self.adapter.exact._asdict(),
      is_causal=is_causal,
      query_mask=self.query_mask,
      key_mask=self.key_mask,
      segment_ids=segment_ids,
      **self.options,
    )

  def masked(self, query_mask: Array | None, key_mask: Array | None) -> "_Call":
    """Adds masks ``[B or 1, T]`` and ``[B or 1, S]`` to those of the call."""
    return dataclasses.replace(
      self,
      query_mask=_join_masks(self.query_mask, query_mask, self.query),
      key_mask=_join_masks(self.key_mask, key_mask, self.key),
    )

  def attend_product(
    self, query_mask: MaskArray, key_mask: MaskArray, is_causal: bool
  ) -> Array:
    """Attends where real queries see real keys, causally or not."""
    call = self.masked(query_mask, key_mask)
    if is_causal:
      call = call.with_as_many_keys()
    return call.run(is_causal)

  def with_as_many_keys(self) -> "_Call":
    """Drops or pads keys to as many as there are queries, for causal calls.

    Query i sees keys 0..i only, so no query sees the keys that are dropped.
    """
    length, num_keys = self.query.shape[1], self.key.shape[1]
    if length == num_keys:
      return self
    missing = max(length - num_keys, 0)
    key_mask = self.key_mask
    if missing and key_mask is None:
      key_mask = jnp.ones(self.key.shape[:2], bool)
    fit = lambda x: _padded(x[:, :length], after=missing)
    key, value, key_mask = jax.tree.map(fit, (self.key, self.value, key_mask))
    return dataclasses.replace(self, key=key, value=value, key_mask=key_mask)

  def attend_segments(self, form: Form, *, is_causal: bool) -> Array:
    """Attends within each group, causally or not."""
    call = self.masked(form.query_mask, form.key_mask)
    ids = jnp.broadcast_to(form.query_group, self.query.shape[:2])
    return call.run(is_causal, ids)

  def attend_chain(self, form: Form) -> Array:
    """Attends to the keys of a query's group whose rank is at most its own."""
    return self._on_shards(_attend_sorted, form)

  def attend_positions(self, form: Form) -> Array:
    """Attends causally, each query from the position of its last key."""
    return self._on_shards(_attend_in_place, form)

  def _on_shards(
    self, attend: Callable[["_Call", Form], Array], form: Form
  ) -> Array:
    """Calls `attend` for each device's examples and heads; see `on_shards`."""

    def on_one_device(
      query: Array,
      key: Array,
      value: Array,
      variables: FeatureVariables,
      stats: PyTree,
      masks: tuple[Form, MaskArray, MaskArray],
    ) -> tuple[Array, tuple[()]]:
      """Returns the output; () since there is no state."""
      form, query_mask, key_mask = masks
      adapter = dataclasses.replace(
        self.adapter, variables=variables, stats=stats
      )
      call = _Call(
        adapter, query, key, value, query_mask, key_mask, self.options
      )
      return attend(call, form), ()

    return meshes.on_shards(
      on_one_device,
      self.query,
      self.key,
      self.value,
      by_head=self.adapter.variables,
      by_example_and_head=self.adapter.stats,
      by_example=(form, self.query_mask, self.key_mask),
    )[0]


def _attend_sorted(call: _Call, form: Form) -> Array:
  """Sorts keys and queries into one causal sequence, and attends.

  They are sorted by group, then by rank, keys before queries. At the position
  of a key the query is masked, and at the position of a query the key is.
  """
  batch, length = call.query.shape[:2]
  num_keys = call.key.shape[1]
  call = call.masked(form.query_mask, form.key_mask)

  def joined(of_keys: MaskArray, of_queries: MaskArray) -> Array:
    both = jnp.concatenate([of_keys, of_queries], axis=1)
    return jnp.broadcast_to(both, (batch, num_keys + length))

  group = joined(form.key_group, form.query_group)
  rank = joined(form.key_rank, form.query_rank)
  # Keys have smaller indices, so they come before queries of equal rank.
  index = jnp.zeros_like(group) + jnp.arange(num_keys + length)[None]
  order = jnp.lexsort((index, rank, group), axis=1)
  query, query_mask = (
    _take(_padded(x, before=num_keys), order)
    for x in (call.query, call.query_mask)
  )
  key, value, key_mask = (
    _take(_padded(x, after=length), order)
    for x in (call.key, call.value, call.key_mask)
  )
  call = _Call(
    call.adapter, query, key, value, query_mask, key_mask, call.options
  )
  out = call.run(True, _take(group, order))
  return _take(out, jnp.argsort(order, axis=1)[:, num_keys:])


def _attend_in_place(call: _Call, form: Form) -> Array:
  """Attends with each query moved to its position among the keys."""
  call = call.masked(form.query_mask, form.key_mask)
  position = jnp.broadcast_to(form.query_rank, call.query.shape[:2])
  stands_at = position[:, None] == jnp.arange(call.key.shape[1])[None, :, None]
  stands_at = stands_at & call.query_mask[:, None]
  moved = dataclasses.replace(
    call,
    query=_take(call.query, stands_at.argmax(axis=2)),
    query_mask=stands_at.any(axis=2),
  )
  out = _take(moved.run(True), position)
  return jnp.where(call.query_mask[:, :, None, None], out, 0)


def _join_masks(mask: MaskArray, other: MaskArray, x: Array) -> MaskArray:
  """Joins two masks of x's positions to one ``[B, T]``; None is all True."""
  if mask is None or other is None:
    mask = other if mask is None else mask
  else:
    mask = mask & other
  return None if mask is None else jnp.broadcast_to(mask, x.shape[:2])


def _padded(x: Array, before: int = 0, after: int = 0) -> Array:
  """Pads axis 1 with zeros (False)."""
  return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def _take(x: Array, order: Array) -> Array:
  """Takes positions `order` ``[B, L]`` of axis 1."""
  return jnp.take_along_axis(
    x, order.reshape(*order.shape, *(1,) * (x.ndim - 2)), axis=1
  )
