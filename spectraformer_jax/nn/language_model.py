"""Language models, causal and masked."""

import flax.linen as nn
import jax.numpy as jnp

from spectraformer_jax.nn.config import ModelFields
from spectraformer_jax.nn.inputs import Tokens, real_positions
from spectraformer_jax.nn.token_encoder import TokenEncoder
from spectraformer_jax.typing import Array


class LanguageModel(ModelFields):
  """Causal Transformer: returns the logits of each next token.

  Attributes:
    vocab_size: number of token ids.
    max_len: longest sequence; size of the table of learned positions.
    embed_dim, num_layers, ..., remat: see `EncoderConfig`. Components with
      data-dependent parameters need statistics="ema", "learned" or "constant".

  Example:
    >>> import jax, spectraformer_jax as sf
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

  @nn.compact
  def __call__(
    self,
    tokens: Tokens,
    length: Array | None = None,
    *,
    segment_ids: Array | None = None,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """Computes the logits of the token after each position.

    Args:
      tokens: ``[B, T]`` ints in [0, vocab_size), T at most `max_len`; see
        `TokenEncoder` for other ints.
      length: ``[B]`` ints, the number of real tokens of each row: the rest is
        padding; None for no padding.
      segment_ids: ints ``[B, T]`` of packed rows: attention stays inside each
        segment, and positions start at 0 in each.
      decode: the tokens continue the sequences of earlier calls, whose state,
        of constant size, is in the collection "cache". Pass
        ``mutable=["cache"]`` and the cache that the previous call returned; the
        first call takes no cache, or that of `init`. A call takes any number of
        tokens; with `length` each row continues from its own last real token.
        Calls beyond `max_len` tokens in all give NaN if positions are
        "learned" or "sinusoidal".
      deterministic: False in training: applies dropout (which needs an rng
        "dropout") and updates running statistics.

    Returns:
      ``[B, T, vocab_size]`` float32.

    Raises:
      ValueError: a sequence longer than `max_len`; a `max_len` above that of
        the component; a token out of the vocabulary; `decode` with exact
        attention (which has no state), with `segment_ids`, or with `length` and
        a component that counts positions.
    """
    encoder = TokenEncoder.from_config(self, is_causal=True)
    nn.share_scope(self, encoder)
    x = encoder(
      tokens,
      real_positions(tokens, length),
      segment_ids=segment_ids,
      decode=decode,
      deterministic=deterministic,
    )
    return token_logits(self, self.vocab_size, x)


class MaskedLanguageModel(ModelFields):
  """Bidirectional Transformer: returns logits of the token at each position.

  Attributes:
    vocab_size, max_len: see `LanguageModel`.
    embed_dim, num_layers, ..., remat: see `EncoderConfig`.

  Example:
    >>> import jax, spectraformer_jax as sf
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

  @nn.compact
  def __call__(
    self,
    tokens: Tokens,
    length: Array | None = None,
    *,
    segment_ids: Array | None = None,
    deterministic: bool = True,
  ) -> Array:
    """Computes the logits of the token at each position.

    Args:
      tokens: ``[B, T]`` ints, with a mask token (one of the `vocab_size` ids)
        at positions to predict.
      length: see `LanguageModel`.
      segment_ids: see `LanguageModel`.
      deterministic: see `LanguageModel`.

    Returns:
      ``[B, T, vocab_size]`` float32.

    Raises:
      ValueError: a sequence longer than `max_len`, or a token out of the
        vocabulary.
    """
    encoder = TokenEncoder.from_config(self)
    nn.share_scope(self, encoder)
    x = encoder(
      tokens,
      real_positions(tokens, length),
      segment_ids=segment_ids,
      deterministic=deterministic,
    )
    return token_logits(self, self.vocab_size, x)


def token_logits(config: ModelFields, vocab_size: int, x: Array) -> Array:
  """Applies the head over the vocabulary, inside a compact method.

  Args:
    config: the module that the head belongs to.
    vocab_size: number of logits.
    x: ``[B, T, D]``.

  Returns:
    ``[B, T, vocab_size]`` float32.
  """
  head = nn.Dense(vocab_size, param_dtype=config.param_dtype, name="logits")
  return head(x.astype(jnp.float32))
