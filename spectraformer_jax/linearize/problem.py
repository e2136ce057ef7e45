"""The problem that a fit solves: its static facts, and its arrays."""

import functools
import hashlib
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax import checks
from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.feature_maps.vmap_heads import queries_by_key_head
from spectraformer_jax.hybrid_attention import selection
from spectraformer_jax.hybrid_attention.exact_keys import (
  ExactKeys,
  check_exact_keys,
  exact_keys_of,
  kernel_of,
)
from spectraformer_jax.kernels import KERNELS
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array, Mask

LOSSES = ("cross_entropy", "output")


class Examples(Protocol):
  """Arrays of several sequences: `AttentionArrays`, or `Inputs` of the study.

  Attributes:
    query: ``[B, T, N G, H]``.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``; only ``loss="output"`` needs it.
    key_mask: bool ``[B, S]`` or None.
    query_mask: bool ``[B, T]`` or None.
  """

  @property
  def query(self) -> Any: ...  # noqa: D102
  @property
  def key(self) -> Any: ...  # noqa: D102
  @property
  def value(self) -> Any: ...  # noqa: D102
  @property
  def key_mask(self) -> Any: ...  # noqa: D102
  @property
  def query_mask(self) -> Any: ...  # noqa: D102


class Problem(NamedTuple):
  """The static facts of a fit.

  Attributes:
    feature_map: whose parameters are fitted.
    exact: keys that attention sees exactly.
    is_causal: query i sees keys 0..i.
    target: kernel of the exact attention that is copied.
    loss: one of `LOSSES`.
    groups: G, the number of queries that share a key head.
    rows: queries of a sequence that a step samples.
    batch_size: sequences that a step samples.
  """

  feature_map: FeatureMap
  exact: ExactKeys
  is_causal: bool
  target: str
  loss: str
  groups: int
  rows: int
  batch_size: int


class Sequences(NamedTuple):
  """Sequences of one layer as the loss takes them; zeros where masked.

  Attributes:
    query: scaled queries, ``[B, N, T G, H]`` float32. The G queries that share
      a key head and a position are neighbours.
    key: scaled keys, ``[B, N, S, H]`` float32.
    value: ``[B, N, S, V]`` float32; None for ``loss="cross_entropy"``.
    query_mask: bool ``[B, T G]``.
    key_mask: bool ``[B, S]``.
    is_special: bool ``[B, N or 1, S]``: sinks and heavy keys.
  """

  query: Array
  key: Array
  value: Array | None
  query_mask: Array
  key_mask: Array
  is_special: Array


def make_problem(
  arrays: AttentionArrays,
  feature_map: FeatureMap,
  *,
  loss: str,
  target: str,
  is_causal: bool,
  window: Any,
  num_sinks: int,
  num_heavy: int,
  rows: int,
  batch_size: int,
) -> Problem:
  """Checks what a fit is asked to do, and returns its static facts.

  Raises:
    ValueError: an argument has a wrong value, or does not go with another one.
  """
  check_choice("loss", loss, LOSSES)
  check_choice("target", target, KERNELS)
  checks.check_bool("is_causal", is_causal)
  checks.check_positive_int("rows", rows)
  checks.check_positive_int("batch_size", batch_size)
  examples, length, heads, _ = arrays.query.shape
  if batch_size > examples:
    raise ValueError(
      f"batch_size must be at most the number of sequences, {examples}, got "
      f"{batch_size}."
    )
  exact = exact_keys_of(window, num_sinks, num_heavy, is_causal=is_causal)
  if not exact.are_none:
    kernel = kernel_of(feature_map.component)
    check_exact_keys(exact, arrays, is_causal=is_causal, has_state=False)
    if kernel != target:
      raise ValueError(
        f"exact keys have the {kernel} kernel of component "
        f"{feature_map.component.info.name!r}, so they need target={kernel!r}, "
        f"got {target!r}."
      )
  groups = heads // arrays.key.shape[2]
  rows = min(int(rows), length * groups)
  return Problem(
    feature_map,
    exact,
    bool(is_causal),
    target,
    loss,
    groups,
    rows,
    int(batch_size),
  )


def check_fits(feature_map: FeatureMap) -> None:
  """Raises ValueError unless the map has parameters that can be fitted."""
  info, component = feature_map.info, feature_map.component.info
  if not feature_map.has_params:
    raise ValueError(
      f"feature map {info.name!r} has no parameters, so there is nothing to "
      "fit: use steps=0 to certify it as it is, or a map with parameters such "
      "as 'prototypes-none'."
    )
  if not info.positive:
    raise ValueError(
      f"feature map {info.name!r} has negative features, so its weights have "
      "no logarithm: use a positive one such as 'prototypes-none'."
    )
  if info.needs_stats:
    raise ValueError(
      f"feature map {info.name!r} needs statistics of its inputs, which are "
      "not fitted: build it with statistics='learned', or use "
      "'prototypes-none'."
    )
  if component.positional:
    raise ValueError(
      f"component {component.name!r} depends on positions, which sampled rows "
      "do not have: use one that does not, such as 'prototypes'."
    )


def arrays_of(examples: Examples, *, needs_value: bool) -> AttentionArrays:
  """Returns checked arrays, with masks; keys stand in for missing values.

  Raises:
    ValueError: shapes do not agree, a value is needed and missing, a mask hides
      a whole sequence, or visible numbers are not finite.
  """
  value = examples.value if needs_value else examples.key
  arrays = checks.attention_arrays(
    examples.query,
    examples.key,
    value,
    key_mask=examples.key_mask,
    query_mask=examples.query_mask,
  )
  if checks.is_empty(arrays.query, arrays.key, arrays.value):
    raise ValueError(
      f"query and key must not be empty, got query.shape={arrays.query.shape}, "
      f"key.shape={arrays.key.shape}."
    )
  masks = {}
  for name, x in (("query", arrays.query), ("key", arrays.key)):
    mask = getattr(arrays, f"{name}_mask")
    mask = jnp.ones(x.shape[:2], bool) if mask is None else mask
    masks[f"{name}_mask"] = mask
    if not bool(jnp.all(jnp.any(mask, axis=1))):
      hidden = np.flatnonzero(~np.any(np.asarray(mask), axis=1))
      raise ValueError(f"{name}_mask hides all of sequence {hidden[0]}.")
    is_finite = jnp.isfinite(x) | ~mask[:, :, None, None]
    if not bool(jnp.all(is_finite)):
      raise ValueError(f"{name} is not finite at all visible positions.")
  return arrays._replace(**masks)


def check_disjoint(fitted: AttentionArrays, held_out: AttentionArrays) -> None:
  """Raises ValueError if a held-out sequence is among the fitted ones."""
  seen = set(_fingerprints(fitted))
  both = sum(print_ in seen for print_ in _fingerprints(held_out))
  if both:
    raise ValueError(
      f"{both} of the {len(held_out.query)} held-out sequences are among the "
      f"{len(seen)} that are fitted: hold out others."
    )


def _fingerprints(arrays: AttentionArrays) -> list[bytes]:
  """Returns a hash of each sequence's visible queries and keys."""
  prints = []
  query, key, _, key_mask, query_mask, _ = map(np.asarray, arrays)
  for q, k, q_mask, k_mask in zip(
    query, key, query_mask, key_mask, strict=True
  ):
    digest = hashlib.sha256(q[q_mask].tobytes())
    digest.update(k[k_mask].tobytes())
    prints.append(digest.digest())
  return prints


def make_sequences(
  problem: Problem, arrays: AttentionArrays, scale: float | Array | None
) -> Sequences:
  """Scales the arrays, and finds the sinks and heavy keys."""
  sqrt_scale, factor = checks.split_scale(scale, arrays.query.shape[-1])
  factor = sqrt_scale if factor is None else factor
  return _make_sequences(problem, arrays, jnp.float32(factor))


@functools.partial(jax.jit, static_argnames="problem")
def _make_sequences(
  problem: Problem, arrays: AttentionArrays, sqrt_scale: Array
) -> Sequences:
  """Computes `make_sequences` of arrays with masks."""
  query, key, value, key_mask, query_mask, _ = arrays
  assert key_mask is not None and query_mask is not None  # from `arrays_of`
  batch, length, _, head_dim = query.shape
  heads = key.shape[2]
  x = scaled(query, query_mask, sqrt_scale)
  y = scaled(key, key_mask, sqrt_scale)
  is_special = jnp.zeros((batch, 1, key.shape[1]), bool)
  if not problem.exact.are_none:
    choice = selection.choose(
      problem.exact,
      problem.target,
      x.reshape(batch, length, heads, problem.groups, head_dim),
      y,
      query_mask,
      key_mask,
    )
    is_rest = choice.is_rest.reshape(*key.shape[:2], -1)
    is_special = jnp.swapaxes(key_mask[..., None] & ~is_rest, 1, 2)
  by_head, row_mask = queries_by_key_head(x, query_mask, heads)
  assert row_mask is not None
  of_head = lambda x: jnp.swapaxes(x, 1, 2)
  return Sequences(
    of_head(by_head),
    of_head(y),
    of_head(scaled(value, key_mask, 1.0)) if problem.loss == "output" else None,
    row_mask,
    key_mask,
    is_special,
  )


def scaled(x: Array, mask: Mask, factor: Array | float) -> Array:
  """Returns x ``[B, T, N, H]`` times `factor`, float32, zeros where masked."""
  x = x.astype(jnp.float32) * factor
  return x if mask is None else jnp.where(mask[:, :, None, None], x, 0.0)
