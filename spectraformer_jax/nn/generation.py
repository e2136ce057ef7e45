"""Generation: tokens one by one, from states of constant size."""

import functools

import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.nn.language_model import LanguageModel
from spectraformer_jax.typing import Array, PyTree


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
  # Generation starts from its prompt, whatever was decoded before.
  given = {k: v for k, v in variables.items() if k != "cache"}

  def read(cache, tokens):
    logits, new = model.apply(
      {**given, **cache}, tokens, decode=True, mutable=["cache"]
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
