"""Generation: tokens one by one, from states of constant size."""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax import checks
from spectraformer_jax.nn.inputs import (
  check_length,
  check_tokens,
  known,
  token_ids,
)
from spectraformer_jax.nn.language_model import LanguageModel, real_positions
from spectraformer_jax.nn.seq2seq import Seq2Seq
from spectraformer_jax.typing import Array, PyTree


def generate(
  model: LanguageModel | Seq2Seq,
  variables: PyTree,
  prompt: Array,
  *,
  num_tokens: int,
  prompt_length: Array | None = None,
  source: Array | None = None,
  source_length: Array | None = None,
  end_token: int | None = None,
  rng: Array | None = None,
  temperature: float = 0.0,
  top_k: int | None = None,
  top_p: float | None = None,
) -> Array:
  """Continues prompts; each token costs O(M V), however long the text is.

  Args:
    model: with attention="spectral".
    variables: of the model; a cache among them is not looked at.
    prompt: ``[B, T]`` ints, T at least 1; of a `Seq2Seq` the start of the
      target.
    num_tokens: how many to add.
    prompt_length: ``[B]`` ints from 1 to T, where prompts differ in length:
      tokens from there on are padding. Each row goes on from its own.
    source: ``[B, S]`` ints, of a `Seq2Seq`: read once.
    source_length: ``[B]`` ints, or None for no padding.
    end_token: a row that has drawn it holds nothing else from there on.
    rng: PRNG key; needed where `temperature` is not 0.
    temperature: logits are divided by it and tokens drawn; 0 takes the
      likeliest.
    top_k: draw from the k likeliest tokens only.
    top_p: draw from the likeliest tokens only, as few as have this probability
      together (Holtzman et al., "The Curious Case of Neural Text Degeneration",
      2020); of those of `top_k`, if both are given.

  Returns:
    The new tokens ``[B, num_tokens]``, int32; -1 where logits (over the
    temperature) are NaN or infinite, as after a token out of the vocabulary
    that was not known before the program ran.

  Raises:
    ValueError: longer than `max_len` in all, an empty prompt, a token out of
      the vocabulary, prompts of different lengths where features depend on
      positions, a source that is missing or not read, an option out of its
      range, or none of `rng` and temperature 0.

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
  longest = prompt.shape[1]
  if prompt_length is not None:
    prompt_length = check_length(prompt_length, prompt, "prompt_length")
    lengths = known(prompt_length)
    if lengths is not None and lengths.size:
      if lengths.min() < 1 or lengths.max() > prompt.shape[1]:
        raise ValueError(
          f"prompt_length must be from 1 to prompt.shape[1]={prompt.shape[1]}, "
          f"got {lengths.tolist()}."
        )
      longest = int(lengths.max())
      if lengths.min() == prompt.shape[1]:
        prompt_length = None
  if not 1 <= longest <= model.max_len - options.num_tokens:
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
  # Generation starts from its prompt, whatever was decoded before.
  variables = {k: v for k, v in variables.items() if k != "cache"}
  rng = jax.random.key(0) if rng is None else rng
  inputs = prompt, prompt_length, source, source_length
  return _generate(model, variables, inputs, rng, options)


@functools.partial(jax.jit, static_argnames=("model", "options"))
def _generate(model, variables, inputs, rng, options):
  """`generate` on checked arguments."""
  prompt, prompt_length, *source = inputs

  def read(cache, tokens, length, source=(None, None)):
    sources = tuple(source) if isinstance(model, Seq2Seq) else ()
    logits, new = model.apply(
      {**variables, **cache},
      *(*sources, tokens, length),
      decode=True,
      mutable=["cache"],
    )
    if length is None:
      return new, logits[:, -1]
    last = jnp.take_along_axis(
      logits, (length - 1)[:, None, None], axis=1, mode="fill"
    )[:, 0]
    return new, jnp.where(length[:, None] > 0, last, jnp.nan)

  def choose(rng, logits, ended):
    token = options.choose(rng, logits)
    if options.end_token is None:
      return token, ended
    token = jnp.where(ended, options.end_token, token)
    return token, token == options.end_token

  def step(carry, rng):
    cache, logits, ended = carry
    token, ended = choose(rng, logits, ended)
    return (*read(cache, token[:, None], None), ended), token

  ended = jnp.zeros(prompt.shape[:1], bool)
  carry = (*read({}, prompt, prompt_length, source), ended)
  rngs = jax.random.split(rng, options.num_tokens)
  # The last token is chosen and not read.
  (_, logits, ended), tokens = jax.lax.scan(step, carry, rngs[:-1])
  last, _ = choose(rngs[-1], logits, ended)
  return jnp.concatenate([tokens, last[None]]).T


@dataclasses.dataclass(frozen=True)
class _Options:
  """How tokens are chosen; see `generate`."""

  num_tokens: int
  end_token: int | None
  temperature: float
  top_k: int | None
  top_p: float | None

  def checked(self, vocab_size: int, rng: Array | None) -> "_Options":
    """The same as numbers of Python; ValueError if they are not in range."""
    checks.check_positive_int("num_tokens", self.num_tokens)
    temperature = _number("temperature", self.temperature)
    if not 0.0 <= temperature < math.inf or (temperature and rng is None):
      raise ValueError(
        f"temperature={temperature} must be 0, or positive with an rng."
      )
    end_token, top_k, top_p = (
      value if value is None else _number(name, value)
      for name, value in (
        ("end_token", self.end_token),
        ("top_k", self.top_k),
        ("top_p", self.top_p),
      )
    )
    if not (top_k is None and top_p is None) and not temperature:
      raise ValueError(
        f"top_k={top_k} and top_p={top_p} need a temperature above 0: at 0 the "
        "likeliest token is taken."
      )
    if end_token is not None and end_token not in range(vocab_size):
      raise ValueError(
        f"end_token must be in [0, vocab_size={vocab_size}), got {end_token}."
      )
    if top_k is not None and top_k not in range(1, vocab_size + 1):
      raise ValueError(
        f"top_k must be an int from 1 to vocab_size={vocab_size}, got {top_k}."
      )
    if top_p is not None and not 0.0 < top_p <= 1.0:
      raise ValueError(f"top_p must be in (0, 1], got {top_p}.")
    return _Options(
      int(self.num_tokens),
      None if end_token is None else int(end_token),
      temperature,
      None if top_k is None else int(top_k),
      top_p,
    )

  def choose(self, rng: Array, logits: Array) -> Array:
    """Tokens ``[B]`` of logits ``[B, vocab_size]``; -1 for NaN or overflow."""
    if self.temperature:
      logits = logits / self.temperature
    if not self.temperature:
      token = jnp.argmax(logits, axis=-1)
    elif self.top_k is None and self.top_p is None:
      token = jax.random.categorical(rng, logits)
    else:
      best, order = jax.lax.top_k(logits, self.top_k or logits.shape[-1])
      if self.top_p is not None:
        share = jax.nn.softmax(best, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        best = jnp.where(before < self.top_p, best, -jnp.inf)
      index = jax.random.categorical(rng, best)
      token = jnp.take_along_axis(order, index[:, None], axis=-1)[:, 0]
    can_be_compared = jnp.all(logits < jnp.inf, axis=-1)
    return jnp.where(can_be_compared, token, -1).astype(jnp.int32)


def _number(name: str, value) -> float:
  """A number of Python; ValueError for what is none before the program runs."""
  if isinstance(value, jax.core.Tracer):
    raise ValueError(
      f"{name} must be a number, got a traced value: programs differ by it, "
      "so pass it to jax.jit as a static argument."
    )
  if isinstance(value, bool) or np.ndim(value):
    raise ValueError(f"{name} must be a number, got {value!r}.")
  try:
    return float(value)
  except (TypeError, ValueError):
    raise ValueError(f"{name} must be a number, got {value!r}.") from None
