"""Spectral attention in the places where other attention functions go.

Both adapters get masks over query and key positions. Linear attention can
honour those that one pass over keys in some order can make; `mask_forms`
takes them apart. Others are refused (see `as_attention_fn`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.adapters import mask_forms
from spectraformer_jax.adapters.forms import attend
from spectraformer_jax.attention_checks import check_statistics
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.typing import Array, FeatureVariables, PyTree


@dataclasses.dataclass(frozen=True, eq=False)
class Adapter:
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
    if not isinstance(other, Adapter):
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
class AttentionFn(Adapter):
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
    return attend(
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
class DotProductAttention(Adapter):
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
    return attend(
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
  return np.array_equal(mask_forms.known(one), mask_forms.known(two))


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
