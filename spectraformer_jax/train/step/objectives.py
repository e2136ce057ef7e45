"""Objectives: a run learns labels, or the tokens of its own inputs.

Self-pretraining (Amos, Berant, Gupta, "Never Train from Scratch", 2023, arXiv
2310.02980): a run with the objective "masked" or "causal" predicts tokens of
the task's inputs, and a later run starts from its weights
(`config.model.init_from`).

For these objectives, a batch with a label and a weight for each example becomes
one with a label and a weight for each position. The training steps do not
change.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.checks import positions_before
from spectraformer_jax.data import Dataset
from spectraformer_jax.train.step.state import TrainState
from spectraformer_jax.train.step.steps import replica_rng
from spectraformer_jax.typing import Array

OBJECTIVES = ("classify", "masked", "causal")

# One token in `_MASK_PERIOD` is masked.
_MASK_PERIOD = 7
# Folded into the dropout key, it gives the key that draws the masked tokens.
_MASK_STREAM = 2**32 - 1


def check_lengths(objective: str, datasets: Mapping[str, Dataset]) -> None:
  """Refuses data without tokens to predict.

  Raises:
    ValueError: the objective is "causal", and in one of the splits no sequence
      has a next token.
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


def for_objective(
  step: Callable[..., Any], *, objective: str, mask_token: int
) -> Callable[..., Any]:
  """Makes a step that calls `step` with the batch of `with_token_labels`.

  For "classify" it returns `step` itself.

  Args:
    step: `(state, batch, *rest, axis_name=None)`, one of `steps`; the first of
      `rest`, if any, is a PRNG key.
    objective: one of `OBJECTIVES`.
    mask_token: see `with_token_labels`.
  """
  if objective == "classify":
    return step

  @functools.wraps(step)
  def on_token_labels(
    state: TrainState,
    batch: Mapping[str, Array],
    *rest: Any,
    axis_name: str | None = None,
  ) -> Any:
    mask_rng = None
    if rest:
      mask_rng = jax.random.fold_in(rest[0], np.uint32(_MASK_STREAM))
      mask_rng = replica_rng(mask_rng, state.step, axis_name)
    batch = with_token_labels(objective, mask_token, batch, mask_rng)
    return step(state, batch, *rest, axis_name=axis_name)

  return on_token_labels


def with_token_labels(
  objective: str, mask_token: int, batch: Mapping[str, Array], rng: Array | None
) -> dict[str, Array]:
  """Returns the batch of a language model: inputs, labels and weights.

  "causal": the label at each position is the next token. "masked": one token in
  seven is replaced by `mask_token` and is the label at its position. These
  tokens are drawn for each batch; without `rng` they are every seventh, so that
  all evaluations mask the same ones. All examples count the same, however many
  labels they have.

  Args:
    objective: "masked" or "causal".
    mask_token: id that replaces masked tokens.
    batch: tokens [B, T] and length, weight [B]. The sequences tokens_2 and
      length_2 of a pair become further rows; each row has half the weight.
    rng: PRNG key in training, None in evaluation.

  Returns:
    tokens, label [B, T] int32, weight [B, T] float32 and length [B]; pairs have
    2B rows.

  Example:
    >>> batch = {"tokens": jnp.array([[5, 6, 7, 0]]), "length": jnp.array([3]),
    ...          "weight": jnp.ones(1)}
    >>> made = with_token_labels("masked", 9, batch, None)
    >>> made["tokens"].tolist(), made["weight"].tolist()
    ([[5, 9, 7, 0]], [[0.0, 1.0, 0.0, 0.0]])
    >>> made = with_token_labels("causal", 9, batch, None)
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
    is_label = positions_before(length - 1, tokens.shape[1])
  else:
    label, is_label = tokens, _masked(tokens, length, rng)
    tokens = jnp.where(is_label, mask_token, tokens)
  count = jnp.maximum(jnp.sum(is_label, axis=1), 1).astype(weight.dtype)
  return {
    "tokens": tokens,
    "length": length,
    "label": label,
    "weight": jnp.where(is_label, (weight / count)[:, None], 0.0),
  }


def _masked(tokens: Array, length: Array, rng: Array | None) -> Array:
  """Returns a bool array ``[B, T]``: True for masked tokens."""
  is_token = positions_before(length, tokens.shape[1])
  if rng is not None:
    drawn = jax.random.bernoulli(rng, 1 / _MASK_PERIOD, is_token.shape)
    return is_token & drawn
  # The middle token is masked, so a sequence of any length has a masked token.
  start = (length // 2) % _MASK_PERIOD
  index = jnp.arange(tokens.shape[1]) % _MASK_PERIOD
  return is_token & (index[None] == start[:, None])
