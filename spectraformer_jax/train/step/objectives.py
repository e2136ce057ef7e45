"""What a run learns: the labels, or the tokens of its own inputs.

Self-pretraining (Amos, Berant, Gupta, "Never Train from Scratch", 2023, arXiv
2310.02980): a run with the objective "masked" or "causal" learns the task's
tokens, and another starts from its weights (`config.model.init_from`).

A batch of a task becomes a batch of guesses, with a label and a weight for each
position instead of each example, and goes through the same steps.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.checks import positions_before
from spectraformer_jax.data import Dataset
from spectraformer_jax.train.step.steps import replica_rng
from spectraformer_jax.typing import Array

OBJECTIVES = ("classify", "masked", "causal")

# Of so many tokens one is hidden.
_HIDDEN_PERIOD = 7
# Sets the key of the hidden tokens apart from that of dropout.
_MASKS = 2**32 - 1


def check_lengths(objective: str, datasets: Mapping[str, Dataset]) -> None:
  """Refuses sequences in which there is nothing to guess.

  Raises:
    ValueError: "causal", and no sequence of a split has a next token.
  """
  if objective != "causal":
    return
  for split, dataset in datasets.items():
    longest = max(
      np.diff(offsets).max()
      for offsets in (dataset.offsets, dataset.offsets_2)
      if offsets is not None
    )
    if longest < 2:
      raise ValueError(
        "config.train.objective='causal' needs sequences of 2 tokens or more; "
        f"the longest of the {split} split of {dataset.name!r} has {longest}."
      )


def guessing(
  step: Callable[..., Any], *, objective: str, mask_token: int
) -> Callable[..., Any]:
  """`step` on the guesses of a batch; for "classify" `step` itself.

  Args:
    step: `(state, batch, *rng, axis_name=None)`, one of `steps`.
    objective: one of `OBJECTIVES`.
    mask_token: see `guesses`.
  """
  if objective == "classify":
    return step
  make = functools.partial(guesses, objective, mask_token)

  @functools.wraps(step)
  def on_guesses(state, batch, *rng, axis_name=None):
    key = None
    if rng:
      key = jax.random.fold_in(rng[0], np.uint32(_MASKS))
      key = replica_rng(key, state.step, axis_name)
    return step(state, make(batch, key), *rng, axis_name=axis_name)

  return on_guesses


def guesses(
  objective: str,
  mask_token: int,
  batch: Mapping[str, Array],
  rng: Array | None,
) -> dict[str, Array]:
  """What a language model reads and has to say.

  "causal": at each position the next token. "masked": one token in seven, which
  the model sees as `mask_token`: drawn anew for each batch, or, without `rng`,
  each seventh, so that every evaluation asks the same. An example counts as
  much as any other, however many its guesses are.

  Args:
    objective: "masked" or "causal".
    mask_token: id of the hidden.
    batch: tokens [B, T] and length, weight [B], perhaps tokens_2 and length_2,
      which become further rows of half the weight.
    rng: PRNG key in training.

  Returns:
    tokens, label [B, T] int32, weight [B, T] float32 and length [B]; 2B rows of
    pairs.

  Example:
    >>> batch = {"tokens": jnp.array([[5, 6, 7, 0]]), "length": jnp.array([3]),
    ...          "weight": jnp.ones(1)}
    >>> made = guesses("masked", 9, batch, None)
    >>> made["tokens"].tolist(), made["weight"].tolist()
    ([[5, 9, 7, 0]], [[0.0, 1.0, 0.0, 0.0]])
    >>> made = guesses("causal", 9, batch, None)
    >>> made["label"][:, :2].tolist(), made["weight"].tolist()
    ([[6, 7]], [[0.5, 0.5, 0.0, 0.0]])
  """
  tokens, length, weight = batch["tokens"], batch["length"], batch["weight"]
  if "tokens_2" in batch:
    tokens = jnp.concatenate([tokens, batch["tokens_2"]])
    length = jnp.concatenate([length, batch["length_2"]])
    weight = jnp.concatenate([weight, weight]) / 2.0
  tokens = tokens.astype(jnp.int32)
  if objective == "causal":
    label = jnp.roll(tokens, -1, axis=1)
    asked = positions_before(length - 1, tokens.shape[1])
  else:
    label, asked = tokens, _hidden(tokens, length, rng)
    tokens = jnp.where(asked, mask_token, tokens)
  count = jnp.maximum(jnp.sum(asked, axis=1), 1).astype(weight.dtype)
  return {
    "tokens": tokens,
    "length": length,
    "label": label,
    "weight": jnp.where(asked, (weight / count)[:, None], 0.0),
  }


def _hidden(tokens: Array, length: Array, rng: Array | None) -> Array:
  """Which real positions ``[B, T]`` are to be guessed."""
  real = positions_before(length, tokens.shape[1])
  if rng is not None:
    return real & jax.random.bernoulli(rng, 1 / _HIDDEN_PERIOD, real.shape)
  # The middle one is among them, so that there is one however short it is.
  start = (length // 2) % _HIDDEN_PERIOD
  index = jnp.arange(tokens.shape[1]) % _HIDDEN_PERIOD
  return real & (index[None] == start[:, None])
