"""Generation of tokens one by one, from a state of constant size."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from spectraformer_jax import checks
from spectraformer_jax.nn.inputs import (
  Tokens,
  check_length,
  check_tokens,
  real_positions,
  token_ids,
)
from spectraformer_jax.nn.language_model import LanguageModel
from spectraformer_jax.nn.seq2seq import Seq2Seq
from spectraformer_jax.typing import Array, PyTree


def generate(
  model: LanguageModel | Seq2Seq,
  variables: PyTree,
  prompt: Tokens,
  *,
  num_tokens: int,
  prompt_length: Array | None = None,
  source: Tokens | None = None,
  source_length: Array | None = None,
  end_token: int | None = None,
  rng: Array | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
) -> Array:
  """Continues prompts; the cost of a token does not grow with the text.

  Attention takes O(M V) for each new token, where M is the number of features
  and V the width of values, and a score for each key of a window and each sink.

  Args:
    model: with attention="spectral".
    variables: of the model; the collection "cache", if any, is ignored.
    prompt: ``[B, T]`` ints, T at least 1; for a `Seq2Seq` the start of the
      target.
    num_tokens: number of tokens to generate.
    prompt_length: ``[B]`` ints from 1 to T, the number of real tokens of each
      row: the rest is padding, and each row continues from its own last real
      token. None for no padding.
    source: ``[B, S]`` ints, for a `Seq2Seq`, which reads it once.
    source_length: ``[B]`` ints, the number of real tokens of each source; None
      for no padding.
    end_token: once a row has generated this token, the token fills the rest of
      the row.
    rng: PRNG key; needed if `temperature` is not 0.
    temperature: divides the logits from which tokens are drawn; 0 takes the
      likeliest token.
    top_k: draw from the k likeliest tokens only.
    top_p: draw from the smallest set of likeliest tokens that has this
      probability (Holtzman et al., "The Curious Case of Neural Text
      Degeneration", 2020), among those of `top_k` if both are given.

  Returns:
    The new tokens ``[B, num_tokens]``, int32; -1 where a logit (divided by the
    temperature) is NaN or plus infinity. Logits are NaN, for example, after a
    token out of the vocabulary that was not known before the program ran.

  Raises:
    ValueError: more than `max_len` tokens in all; an empty prompt; a token out
      of the vocabulary; prompts of different lengths with a component that
      counts positions; a missing source, or one for another model than
      `Seq2Seq`; an option out of its range; a temperature without `rng`.

  Example: see `LanguageModel` and `Seq2Seq`.
  """
  options = _Options(num_tokens, end_token, temperature, top_k, top_p)
  options = options.checked(model.vocab_size, rng)
  if not isinstance(variables, Mapping) or "params" not in variables:
    raise ValueError(
      "variables must be those of model.init, a dict with 'params', got "
      f"{type(variables).__name__}."
    )
  if isinstance(model, Seq2Seq) == (source is None):
    raise ValueError(
      f"source={'None' if source is None else 'given'} with a "
      f"{type(model).__name__}: a Seq2Seq needs one, other models take none."
    )
  prompt = check_tokens(prompt, "prompt")
  longest_prompt = prompt.shape[1]
  if prompt_length is not None:
    prompt_length = check_length(prompt_length, prompt, "prompt_length")
    lengths = checks.concrete(prompt_length)
    if lengths is not None and lengths.size:
      if lengths.min() < 1 or lengths.max() > prompt.shape[1]:
        raise ValueError(
          f"prompt_length must be from 1 to prompt.shape[1]={prompt.shape[1]}, "
          f"got {lengths.tolist()}."
        )
      longest_prompt = int(lengths.max())
      if lengths.min() == prompt.shape[1]:
        prompt_length = None
  if not 1 <= longest_prompt <= model.max_len - options.num_tokens:
    raise ValueError(
      f"prompt.shape={prompt.shape} and num_tokens={num_tokens} must fit "
      f"max_len={model.max_len}, with at least one token in the prompt."
    )
  real = real_positions(prompt, prompt_length, "prompt_length")
  prompt = token_ids(prompt, model.vocab_size, real, "prompt")
  if source is not None:
    source = check_tokens(source, "source")
    real = real_positions(source, source_length, "source_length")
    source = token_ids(source, model.vocab_size, real, "source")
  # Each call starts from its prompt, not from a cache of earlier decoding.
  variables = {k: v for k, v in variables.items() if k != "cache"}
  # Without an rng the temperature is 0, and no random number is used.
  rng = jax.random.key(0) if rng is None else rng
  sources = (source, source_length) if isinstance(model, Seq2Seq) else ()
  return _generate(
    model, variables, prompt, prompt_length, sources, rng, options
  )


@functools.partial(jax.jit, static_argnames=("model", "options"))
def _generate(
  model: LanguageModel | Seq2Seq,
  variables: dict[str, PyTree],
  prompt: Array,
  prompt_length: Array | None,
  sources: tuple[Array | None, ...],
  rng: Array,
  options: "_Options",
) -> Array:
  """Does the work of `generate`, on checked arguments.

  `sources` is ``()``, or the source and its length (or None) of a `Seq2Seq`.
  """

  def read(
    cache: PyTree, tokens: Array, length: Array | None, *source: Array | None
  ) -> tuple[PyTree, Array]:
    """Returns the cache after `tokens`, and the logits of the next token."""
    logits, cache = model.apply(
      {**variables, **cache},
      *source,
      tokens,
      length,
      decode=True,
      mutable=["cache"],
    )
    if length is None:
      return cache, logits[:, -1]
    # A length that is traced is not checked: if it is wrong, the row gets NaN.
    last = jnp.take_along_axis(
      logits, (length - 1)[:, None, None], axis=1, mode="fill"
    )[:, 0]
    return cache, jnp.where(length[:, None] > 0, last, jnp.nan)

  def choose(rng: Array, logits: Array, has_ended: Array) -> tuple[Array, ...]:
    """Returns tokens ``[B]``, and whether each row has ended."""
    token = options.choose(rng, logits)
    if options.end_token is None:
      return token, has_ended
    token = jnp.where(has_ended, options.end_token, token)
    return token, token == options.end_token

  def step(carry: PyTree, rng: Array) -> tuple[PyTree, Array]:
    cache, logits, has_ended = carry
    token, has_ended = choose(rng, logits, has_ended)
    cache, logits = read(cache, token[:, None], None, *(None for _ in sources))
    return (cache, logits, has_ended), token

  cache, logits = read({}, prompt, prompt_length, *sources)
  has_ended = jnp.zeros(prompt.shape[:1], bool)
  rngs = jax.random.split(rng, options.num_tokens)
  # The model does not read the last token, so no step is made for it.
  (_, logits, has_ended), tokens = jax.lax.scan(
    step, (cache, logits, has_ended), rngs[:-1]
  )
  last, _ = choose(rngs[-1], logits, has_ended)
  return jnp.concatenate([tokens, last[None]]).T


@dataclasses.dataclass(frozen=True)
class _Options:
  """Arguments of `generate` that say how tokens are chosen."""

  num_tokens: int
  end_token: int | None
  temperature: float
  top_k: int | None
  top_p: float | None

  def checked(self, vocab_size: int, rng: Array | None) -> "_Options":
    """Converts to Python numbers; raises ValueError for one out of range."""
    checks.check_positive_int("num_tokens", self.num_tokens)
    numbers = {
      name: _number(name, value)
      for name, value in vars(self).items()
      if value is not None or name == "temperature"
    }
    temperature = numbers["temperature"]
    if not 0.0 <= temperature < math.inf or (temperature and rng is None):
      raise ValueError(
        f"temperature={temperature} must be 0, or positive with an rng."
      )
    if {"top_k", "top_p"} & numbers.keys() and not temperature:
      raise ValueError(
        f"top_k={self.top_k} and top_p={self.top_p} need a temperature above "
        "0: at 0 the likeliest token is taken."
      )
    if numbers.get("end_token", 0) not in range(vocab_size):
      raise ValueError(
        f"end_token must be in [0, vocab_size={vocab_size}), got "
        f"{self.end_token}."
      )
    if numbers.get("top_k", 1) not in range(1, vocab_size + 1):
      raise ValueError(
        f"top_k must be an int from 1 to vocab_size={vocab_size}, got "
        f"{self.top_k}."
      )
    if not 0.0 < numbers.get("top_p", 1.0) <= 1.0:
      raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")
    for name in {"num_tokens", "end_token", "top_k"} & numbers.keys():
      numbers[name] = int(numbers[name])
    return dataclasses.replace(self, **numbers)

  def choose(self, rng: Array, logits: Array) -> Array:
    """Chooses from logits ``[B, vocab_size]``.

    Returns:
      Tokens ``[B]``, int32; -1 where a logit is NaN or plus infinity.
    """
    if self.temperature:
      logits = logits / self.temperature
    if not self.temperature:
      token = jnp.argmax(logits, axis=-1)
    elif self.top_k is None and self.top_p is None:
      token = jax.random.categorical(rng, logits)
    else:
      best, order = jax.lax.top_k(logits, self.top_k or logits.shape[-1])
      if self.top_p is not None:
        probability = jax.nn.softmax(best, axis=-1)
        sum_before = jnp.cumsum(probability, axis=-1) - probability
        best = jnp.where(sum_before < self.top_p, best, -jnp.inf)
      index = jax.random.categorical(rng, best)
      token = jnp.take_along_axis(order, index[:, None], axis=-1)[:, 0]
    is_valid = jnp.all(logits < jnp.inf, axis=-1)
    return jnp.where(is_valid, token, -1).astype(jnp.int32)


def _number(name: str, value: Any) -> float:
  """Converts to a float; raises ValueError unless it is a known number."""
  if isinstance(value, Tracer):
    raise ValueError(
      f"{name} must be a number, got a traced value: each value needs its own "
      "program, so pass it to jax.jit as a static argument."
    )
  try:
    if isinstance(value, bool) or np.ndim(value):
      raise TypeError
    return float(value)
  except (TypeError, ValueError):
    raise ValueError(f"{name} must be a number, got {value!r}.") from None
