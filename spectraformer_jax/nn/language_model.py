"""Language models, causal and masked."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.nn.inputs import check_length, check_tokens
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.nn.token_encoder import TokenEncoder
from spectraformer_jax.typing import Array


class LanguageModel(nn.Module):
  """Causal Transformer: the logits of each next token.

  Attributes:
    vocab_size, max_len, embed_dim, num_layers, num_heads, head_dim, mlp_dim,
      mlp, norm, positions, feature_map, attention, attention_kwargs,
      share_projection, num_key_value_heads, dropout_rate, dtype, param_dtype,
      remat: see `TokenEncoder`. Components with data-dependent parameters need
      statistics="ema", "learned" or "constant".

  Example:
    >>> import spectraformer_jax as sf
    >>> model = sf.nn.LanguageModel(
    ...   vocab_size=32, max_len=16,
    ...   feature_map=sf.feature_map("posrf", "orf", num_features=16))
    >>> tokens = jnp.ones((2, 8), int)
    >>> variables = model.init(jax.random.key(0), tokens)
    >>> model.apply(variables, tokens).shape
    (2, 8, 32)
    >>> sf.nn.generate(model, variables, tokens, num_tokens=5).shape
    (2, 5)
  """

  vocab_size: int
  max_len: int
  embed_dim: int = 64
  num_layers: int = 2
  num_heads: int = 2
  head_dim: int = 32
  mlp_dim: int = 128
  mlp: str = "gelu"
  norm: str = "pre"
  positions: str = "learned"
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  attention_kwargs: Mapping[str, Any] | None = None
  share_projection: bool = False
  dropout_rate: float = 0.1
  num_key_value_heads: int | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    length: Array | None = None,
    *,
    segment_ids: Array | None = None,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """Logits of the token after each position.

    Args:
      tokens: ``[B, T]`` ints in [0, vocab_size), T at most `max_len`; others at
        real positions are an error where they are known before the program
        runs, and give NaN where they are not.
      length: ``[B]`` ints: positions from there on are padding; None for none.
      segment_ids: ints ``[B, T]`` of packed rows: each is as if alone, its
        positions included.
      decode: the tokens follow those of earlier calls, which the collection
        "cache" remembers in a size that does not grow: pass
        ``mutable=["cache"]`` and the cache of the call before, at first none
        or that of `init`. Any number of tokens at once; with `length` each row
        goes on from its own. Calls beyond `max_len` in all give NaN where
        positions are learned.
      deterministic: False in training: dropout (needs rng "dropout") and
        updates of running statistics.

    Returns:
      ``[B, T, vocab_size]`` float32.

    Raises:
      ValueError: a sequence longer than `max_len` or a `max_len` beyond that of
        the component, a token out of the vocabulary, `decode` with exact
        attention, which has no state, or with `segment_ids`, or with `length`
        where features depend on positions.
    """
    x = part_of(self, TokenEncoder, is_causal=True)(
      tokens,
      real_positions(tokens, length),
      segment_ids=segment_ids,
      decode=decode,
      deterministic=deterministic,
    )
    return token_logits(self, x)


class MaskedLanguageModel(nn.Module):
  """Bidirectional Transformer: the logits of each token, from all others.

  Attributes:
    vocab_size, max_len, embed_dim, num_layers, num_heads, head_dim, mlp_dim,
      mlp, norm, positions, feature_map, attention, attention_kwargs,
      share_projection, num_key_value_heads, dropout_rate, dtype, param_dtype,
      remat: see `TokenEncoder`.

  Example:
    >>> import spectraformer_jax as sf
    >>> model = sf.nn.MaskedLanguageModel(
    ...   vocab_size=32, max_len=16,
    ...   feature_map=sf.feature_map("oprf", "orf", num_features=16))
    >>> tokens, length = jnp.ones((2, 8), int), jnp.array([8, 3])
    >>> variables = model.init(jax.random.key(0), tokens, length)
    >>> model.apply(variables, tokens, length).shape
    (2, 8, 32)
  """

  vocab_size: int
  max_len: int
  embed_dim: int = 64
  num_layers: int = 2
  num_heads: int = 2
  head_dim: int = 32
  mlp_dim: int = 128
  mlp: str = "gelu"
  norm: str = "pre"
  positions: str = "learned"
  feature_map: FeatureMap | None = None
  attention: str = "spectral"
  attention_kwargs: Mapping[str, Any] | None = None
  share_projection: bool = False
  dropout_rate: float = 0.1
  num_key_value_heads: int | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    length: Array | None = None,
    *,
    segment_ids: Array | None = None,
    deterministic: bool = True,
  ) -> Array:
    """Logits ``[B, T, vocab_size]`` float32 of tokens ``[B, T]``.

    Args:
      tokens: ints, with a mask token (one of `vocab_size`) where to guess.
      length: ``[B]`` ints: positions from there on are padding; None for none.
      segment_ids: as for `LanguageModel`.
      deterministic: as for `LanguageModel`.

    Raises:
      ValueError: a sequence longer than `max_len`, or a token out of the
        vocabulary.
    """
    x = part_of(self, TokenEncoder)(
      tokens,
      real_positions(tokens, length),
      segment_ids=segment_ids,
      deterministic=deterministic,
    )
    return token_logits(self, x)


def real_positions(
  tokens: Array, length: Array | None, name: str = "length"
) -> Array | None:
  """``[B, T]``, True before `length`; None for all."""
  if length is None:
    return None
  tokens = check_tokens(tokens)
  length = check_length(length, tokens, name)
  return checks.positions_before(length, tokens.shape[1])


def token_logits(module: nn.Module, x: Array) -> Array:
  """``[B, T, D] -> [B, T, vocab_size]``, in the caller's compact method."""
  head = nn.Dense(
    module.vocab_size, param_dtype=module.param_dtype, name="logits"
  )
  return head(x.astype(jnp.float32))
