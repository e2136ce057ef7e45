"""Language models, causal and masked, and generation."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.feature_maps import FeatureMap
from spectraformer_jax.nn.parts import part_of
from spectraformer_jax.nn.token_encoder import TokenEncoder
from spectraformer_jax.typing import Array, PyTree


class LanguageModel(nn.Module):
  """Causal Transformer: the logits of each next token.

  Attributes:
    vocab_size, max_len, embed_dim, num_layers, num_heads, head_dim, mlp_dim,
      mlp, norm, positions, feature_map, attention, attention_kwargs,
      share_projection, dropout_rate, dtype: see `TokenEncoder`. Components with
      data-dependent parameters need statistics="ema", "learned" or "constant".

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
  dtype: Any = None
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    length: Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
  ) -> Array:
    """Logits of the token after each position.

    Args:
      tokens: ``[B, T]`` ints, T at most `max_len`.
      length: ``[B]`` ints: positions from there on are padding; None for none.
      decode: the tokens follow those of earlier calls, which the collection
        "cache" remembers in a size that does not grow: pass
        ``mutable=["cache"]`` and the cache of the call before (none at first).
        Any number of tokens at once; calls beyond `max_len` in all give NaN
        where positions are learned.
      deterministic: False in training: dropout (needs rng "dropout") and
        updates of running statistics.

    Returns:
      ``[B, T, vocab_size]`` float32.

    Raises:
      ValueError: a sequence longer than `max_len`, `length` with `decode`, or
        `decode` with exact attention, which has no state.
    """
    if decode and length is not None:
      raise ValueError(
        "decode=True takes sequences of one length: leave out `length`."
      )
    x = part_of(self, TokenEncoder, is_causal=True)(
      tokens,
      _real(tokens, length),
      decode=decode,
      deterministic=deterministic,
    )
    return _logits(x, self.vocab_size)


class MaskedLanguageModel(nn.Module):
  """Bidirectional Transformer: the logits of each token, from all others.

  Attributes:
    vocab_size, max_len, embed_dim, num_layers, num_heads, head_dim, mlp_dim,
      mlp, norm, positions, feature_map, attention, attention_kwargs,
      share_projection, dropout_rate, dtype: see `TokenEncoder`.

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
  dtype: Any = None
  remat: bool = False

  @nn.compact
  def __call__(
    self,
    tokens: Array,
    length: Array | None = None,
    *,
    deterministic: bool = True,
  ) -> Array:
    """Logits ``[B, T, vocab_size]`` float32 of tokens ``[B, T]``.

    Args:
      tokens: ints, with a mask token (one of `vocab_size`) where to guess.
      length: ``[B]`` ints: positions from there on are padding; None for none.
      deterministic: as for `LanguageModel`.

    Raises:
      ValueError: a sequence longer than `max_len`.
    """
    x = part_of(self, TokenEncoder)(
      tokens, _real(tokens, length), deterministic=deterministic
    )
    return _logits(x, self.vocab_size)


def generate(
  model: LanguageModel,
  variables: PyTree,
  prompt: Array,
  *,
  num_tokens: int,
  rng: Array | None = None,
  temperature: float = 0.0,
) -> Array:
  """Continues prompts; each token costs O(M V), however long the text is.

  Args:
    model: with attention="spectral".
    variables: of the model.
    prompt: ``[B, T]`` ints, T at least 1.
    num_tokens: how many to add.
    rng: PRNG key; needed where `temperature` is not 0.
    temperature: logits are divided by it and tokens drawn; 0 takes the
      likeliest.

  Returns:
    The new tokens ``[B, num_tokens]``, int32.

  Raises:
    ValueError: longer than `max_len` in all, an empty prompt, a negative
      temperature, or none of `rng` and temperature 0.

  Example: see `LanguageModel`.
  """
  checks.check_positive_int("num_tokens", num_tokens)
  length = prompt.shape[1]
  if not 1 <= length <= model.max_len - num_tokens:
    raise ValueError(
      f"prompt.shape={prompt.shape} and num_tokens={num_tokens} must fit "
      f"max_len={model.max_len}, with at least one token in the prompt."
    )
  if temperature < 0.0 or (temperature > 0.0 and rng is None):
    raise ValueError(
      f"temperature={temperature} must be 0, or positive with an rng."
    )
  rng = jax.random.key(0) if rng is None else rng
  return _generate(model, variables, prompt, rng, num_tokens, temperature)


@functools.partial(
  jax.jit, static_argnames=("model", "num_tokens", "temperature")
)
def _generate(model, variables, prompt, rng, num_tokens, temperature):
  """`generate` on checked arguments."""

  def read(cache, tokens):
    logits, new = model.apply(
      {**variables, **cache}, tokens, decode=True, mutable=["cache"]
    )
    return new, logits[:, -1]

  def choose(rng, logits):
    if temperature == 0.0:
      return jnp.argmax(logits, axis=-1)
    return jax.random.categorical(rng, logits / temperature)

  def step(carry, rng):
    cache, logits = carry
    token = choose(rng, logits)
    return read(cache, token[:, None]), token

  carry = read({}, prompt)
  rngs = jax.random.split(rng, num_tokens)
  # The last token is chosen and not read.
  (_, logits), tokens = jax.lax.scan(step, carry, rngs[:-1])
  tokens = jnp.concatenate([tokens, choose(rngs[-1], logits)[None]])
  return tokens.T.astype(jnp.int32)


def _real(tokens: Array, length: Array | None) -> Array | None:
  """``[B, T]``, True before `length`; None for all."""
  if length is None:
    return None
  return checks.positions_before(length, tokens.shape[1])


def _logits(x: Array, vocab_size: int) -> Array:
  """``[B, T, D] -> [B, T, vocab_size]``, in the caller's compact method."""
  return nn.Dense(vocab_size, name="logits")(x.astype(jnp.float32))
