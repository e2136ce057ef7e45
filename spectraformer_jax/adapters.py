"""Spectral attention in the places where other attention functions go.

Both adapters get masks over query and key positions. Linear attention can
honour those that one pass over keys in some order can make; `adapter_masks`
takes them apart. Others are refused (see `as_attention_fn`).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax import adapter_masks, checks, meshes
from spectraformer_jax.attention import check_statistics, spectral_attention
from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.typing import Array, FeatureVariables, PyTree

_NOT_HONOURED = (
  "mask must say which queries and which keys are real, and may follow the "
  "causal triangle or keep packed rows apart: linear attention cannot honour "
  "another mask over query and key positions. Use is_causal=True for a causal "
  "mask, and spectral_attention(segment_ids=...) for packed rows."
)


@dataclasses.dataclass(frozen=True, eq=False)
class _Adapter:
  """A record: adapters of equal fields are equal, so nothing is traced again.

  The hash looks at shapes alone; contents are compared where they are not the
  same arrays.
  """

  feature_map: FeatureMap
  variables: FeatureVariables
  stats: PyTree = None

  def _leaves(self):
    return jax.tree.flatten((self.variables, self.stats))

  def _static(self) -> tuple:
    """All but the contents of arrays."""
    leaves, tree = self._leaves()
    shapes = tuple((jnp.shape(x), str(jnp.result_type(x))) for x in leaves)
    return type(self), self.feature_map, tree, shapes

  def __eq__(self, other):
    if not isinstance(other, _Adapter):
      return NotImplemented
    if self is other:
      return True
    pairs = zip(self._leaves()[0], other._leaves()[0], strict=False)
    return self._static() == other._static() and all(
      _equal(*pair) for pair in pairs
    )

  def __hash__(self):
    return hash(self._static())

  def __repr__(self):
    return f"{type(self).__name__}({self.feature_map.info.name!r})"


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class AttentionFn(_Adapter):
  """What `as_attention_fn` returns."""

  is_causal: bool = False

  def _static(self):
    return *super()._static(), self.is_causal

  def __call__(
    self,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
  ) -> Array:
    """Attention in the form that Flax calls it."""
    # `precision`: products that matter are float32 at the highest in any case.
    del broadcast_dropout, dropout_rng, precision
    if dropout_rate and not deterministic:
      raise ValueError(
        f"dropout_rate={dropout_rate} of attention weights cannot be honoured: "
        "they do not exist. Set it to 0 and drop the layer's output instead."
      )
    if module is not None:
      raise ValueError(
        "sow_weights=True cannot be honoured: use implied_attention_weights."
      )
    query, key, value = _arrays(query, key, value)
    if dtype is not None:
      query, key, value = (x.astype(dtype) for x in (query, key, value))
    if is_causal or self.is_causal:
      check_statistics(self.feature_map, self.stats, True, None, False)
    return _attend(
      self,
      query,
      key,
      value,
      mask,
      bias,
      is_causal=self._needs_triangle(query, key, mask, bias, is_causal),
    )

  def _needs_triangle(self, query, key, mask, bias, is_causal) -> bool:
    """Whether the mask does not say all: with a cache, its rows do."""
    length = query.shape[-3]
    if length != key.shape[-3]:
      rows = {np.shape(x)[-2] for x in (mask, bias) if np.ndim(x) > 1}
      if length in rows and (length == 1 or not is_causal):
        return False
      if length == 1 and (mask is not None or bias is not None):
        return False
    return is_causal or self.is_causal


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class DotProductAttention(_Adapter):
  """What `as_dot_product_attention` returns."""

  def __call__(
    self,
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
  ) -> Array:
    """Attention in the form of `jax.nn.dot_product_attention`."""
    if is_causal:
      check_statistics(self.feature_map, self.stats, True, None, False)
    window = local_window_size
    _refuse("local_window_size", window, None, "the sum is over all keys")
    _refuse("return_residual", return_residual, False, "no softmax is taken")
    return _attend(
      self,
      *_arrays(query, key, value),
      mask,
      bias,
      is_bool=True,
      is_causal=is_causal,
      query_lengths=query_seq_lengths,
      key_lengths=key_value_seq_lengths,
      scale=scale,
      implementation=implementation,
    )


def as_attention_fn(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  *,
  stats: PyTree = None,
  is_causal: bool = False,
) -> AttentionFn:
  """`attention_fn` for Flax's own attention modules, Linen and NNX.

  For `flax.linen.MultiHeadDotProductAttention` and
  `flax.nnx.MultiHeadAttention`, with masks as `make_attention_mask`,
  `make_causal_mask` and `combine_masks` make them, and their decode mode (which
  keeps all keys; `decode_step` keeps a state of constant size instead).

  Honoured are masks of real queries and real keys, the causal triangle, packed
  rows (``make_attention_mask(ids, ids, jnp.equal)``), and their combinations,
  also of the keys in a cache: all masks where the keys that two queries see are
  nested or disjoint, in groups. A `bias` of 0 and -inf (or the least float) is
  such a mask, too. Data-dependent components and `cosformer` take real queries
  and real keys, and the triangle, alone.

  What cannot be honoured is an error: another bias, dropout of attention
  weights, `sow_weights`, another mask. A mask that is traced cannot be looked
  at before the program runs; outputs and gradients of examples whose mask is
  another are then NaN, and under ``jax_debug_nans`` the error. Queries that
  see no key give zeros (softmax gives them the mean of all values).

  Args:
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: from ``feature_map.init(rng, head_dim=H, num_heads=N)``, N heads
      of the keys, or 1 to share. Parts of the returned record: they learn where
      it is made of variables that do, in the function that is differentiated.
    stats: data-dependent parameters; see `spectral_attention`.
    is_causal: query i sees keys 0..i. State it where the mask is causal: a
      mask that is looked at when the program runs costs twice as much. With
      T != S, as with a cache, the rows of a mask say which keys instead.

  Returns:
    A frozen record that compares and hashes by its fields and can be pickled; a
    function of query ``[..., T, N, H]``, key ``[..., S, N, H]``, value
    ``[..., S, N, V]`` and the keyword arguments those modules pass; returns
    ``[..., T, N, V]``.

  Raises:
    ValueError: `is_causal` with statistics of the whole sequence; when called,
      what cannot be honoured.

  Example:
    >>> import flax.linen, spectraformer_jax as sf
    >>> fm = sf.feature_map("oprf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8, num_heads=2)
    >>> layer = flax.linen.MultiHeadDotProductAttention(
    ...   num_heads=2, attention_fn=as_attention_fn(fm, v))
    >>> x = jnp.ones((1, 5, 16))
    >>> mask = flax.linen.make_attention_mask(x[..., 0], x[..., 0])
    >>> layer.init_with_output(jax.random.key(1), x, mask=mask)[0].shape
    (1, 5, 16)
  """
  if is_causal:
    check_statistics(feature_map, stats, True, None, False)
  return AttentionFn(feature_map, variables, stats, is_causal)


def as_dot_product_attention(
  feature_map: FeatureMap,
  variables: FeatureVariables,
  *,
  stats: PyTree = None,
) -> DotProductAttention:
  """A function with the signature of `jax.nn.dot_product_attention`.

  Honoured: `mask` (bool, broadcast against ``[B, N, T, S]``) and `bias`, see
  `as_attention_fn` for which; `scale`, `is_causal` (from the top left where
  T != S), `query_seq_lengths`, `key_value_seq_lengths`, grouped queries, and
  arrays without batch axis. `local_window_size`, `return_residual` and
  implementation="cudnn" are errors.

  Args:
    feature_map: from `sf.feature_map` or `sf.compose`.
    variables: from ``feature_map.init(rng, head_dim=H, num_heads=N)``, N heads
      of the keys, or 1 to share.
    stats: data-dependent parameters; see `spectral_attention`.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("posrf", "orf", num_features=32)
    >>> v = fm.init(jax.random.key(0), head_dim=8)
    >>> attention = as_dot_product_attention(fm, v)
    >>> x = jnp.ones((1, 5, 2, 8))
    >>> attention(x, x, x, is_causal=True).shape
    (1, 5, 2, 8)
  """
  return DotProductAttention(feature_map, variables, stats)


def _equal(one: Any, two: Any) -> bool:
  """Whether two leaves are the same array, or known and of equal content."""
  if one is two:
    return True
  for x in (one, two):
    if isinstance(x, jax.core.Tracer):
      return False
    if isinstance(x, jax.Array) and (
      x.is_deleted() or not x.is_fully_addressable
    ):
      return False
  return np.array_equal(adapter_masks.known(one), adapter_masks.known(two))


def _refuse(name: str, value: Any, default: Any, reason: str) -> None:
  """ValueError unless an argument has its default."""
  if value is not default:
    raise ValueError(
      f"{name} ({value}) cannot be honoured by random-feature attention: "
      f"{reason}."
    )


def _arrays(*arrays: Array) -> list[Array]:
  """Query, key and value as arrays; ValueError unless their axes agree."""
  arrays = [jnp.asarray(x) for x in arrays]
  shapes = [x.shape for x in arrays]
  batches = {shape[:-3] for shape in shapes}
  if min(map(len, shapes)) < 3 or len(batches) > 1:
    raise ValueError(
      "query, key and value must be [batch..., length, heads, head_dim] of the "
      f"same batch, got query.shape={shapes[0]}, key.shape={shapes[1]}, "
      f"value.shape={shapes[2]}."
    )
  return arrays


def _attend(
  adapter: _Adapter,
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
    seen, sound = adapter_masks.read_mask(mask, expected, is_bool=is_bool)
  if bias is not None:
    shown, honest = adapter_masks.read_bias(bias, expected)
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
  xp = adapter_masks.numbers(seen)
  seen = xp.broadcast_to(seen, (seen.shape[0], length, num_keys))
  if is_causal:
    seen = seen & adapter_masks.triangle(length, num_keys)[None]
  if not seen.size:
    return work.plain(None, None, is_causal), same
  if is_placed and length == 1:
    form = adapter_masks.placed_form(seen)
    return work.placed(form), same & form.holds
  if xp is np:
    return _honour_known(work, seen, is_causal, same)
  form = adapter_masks.product_form(seen, is_causal)
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
    form = adapter_masks.product_form(seen, triangle)
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

  adapter: _Adapter
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
      return [(adapter_masks.placed_form, self.placed)]
    segments = [(adapter_masks.segment_form, self.packed)]
    chains = [(adapter_masks.chain_form, self.in_order)]
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
