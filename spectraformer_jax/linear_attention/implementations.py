"""The ways to attend, and which of them runs."""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax import checks
from spectraformer_jax.linear_attention import reference
from spectraformer_jax.linear_attention.pallas import implementation as pallas
from spectraformer_jax.linear_attention.state import joined, parted
from spectraformer_jax.linear_attention.xla import (
  bidirectional,
  causal,
  chunks,
  segments,
)
from spectraformer_jax.linear_attention.xla.products import PLAIN
from spectraformer_jax.registry import nearest


def first_that_runs(names, *args, **kwargs) -> Callable:
  """The first implementation that can run, with its arguments.

  Raises:
    ValueError: none can; the message gives the reason of each.
  """
  reasons = []
  for name in names:
    implementation = IMPLEMENTATIONS[name]
    reason = implementation.refuses(*args, **kwargs)
    if reason is None:
      return functools.partial(implementation.run, *args, **kwargs)
    reasons.append(f"implementation {name!r} cannot run: {reason}")
  raise ValueError("; ".join(reasons) + ".")


def _xla(
  maps,
  constants,
  state,
  query,
  key,
  value,
  keep,
  segment_ids,
  *,
  is_causal,
  chunk,
):
  """The linear form in plain XLA."""
  if segment_ids is not None:
    out = segments.packed(
      maps,
      constants,
      state,
      query,
      key,
      value,
      keep,
      segment_ids,
      is_causal=is_causal,
      chunk=chunk,
    )
    return out, None
  if is_causal:
    return _causal(maps, chunk, constants, state, query, key, value, keep)
  return bidirectional.bidirectional(
    maps, constants, state, query, key, value, keep, chunk=chunk
  )


def _causal(maps, chunk, constants, state, query, key, value, keep):
  """The triangle from the top left, whatever T and S are."""
  length, num_keys = query.shape[1], key.shape[1]
  if length == num_keys:
    inputs = query, key, value, keep, None
    return causal.causal(maps, chunk, constants, state, *inputs)
  seen = min(length, num_keys)
  rest = [None if x is None else x[:, seen:] for x in (key, value, keep)]
  inputs = [None if x is None else x[:, :seen] for x in (key, value, keep)]
  if seen < length:
    # Queries from S on see all keys: those that follow are hidden.
    if keep is None:
      inputs[2] = jnp.ones(key.shape[:2], bool)
    inputs = [
      jnp.pad(x, [(0, 0), (0, length - seen)] + [(0, 0)] * (x.ndim - 2))
      for x in inputs
    ]
  out, after = causal.causal(
    maps, chunk, constants, state, query, *inputs, None
  )
  after = after._replace(length=state.length + seen)
  if seen < num_keys:
    after = bidirectional.accumulate(maps.key, chunk, constants, after, *rest)
  return out, after


def _reference(
  maps,
  constants,
  state,
  query,
  key,
  value,
  keep,
  segment_ids,
  *,
  is_causal,
  chunk,
):
  """The quadratic form: every feature and every weight exists."""
  del chunk
  value = value.astype(jnp.float32)
  visible = checks.visible_keys(query, key, is_causal, keep, segment_ids)
  in_groups = jax.vmap(maps.query, in_axes=(None, 2, None), out_axes=2)
  grouped = jnp.moveaxis(query, 1, 3)
  by_head = [jnp.swapaxes(x, 1, 2) for x in (key, value)]
  position = state.length
  # Queries that hold NaN give NaN, but no gradient of their own.
  is_bad = ~jnp.all(jnp.isfinite(grouped), axis=-1, keepdims=True)
  out = reference.attend(
    in_groups(
      constants, jnp.where(is_bad, 0, grouped), position if is_causal else 0
    ),
    maps.key(constants, by_head[0], position),
    by_head[1],
    visible[:, :, None],
    state=state,
    segments=segment_ids,
  )
  keep = None if keep is None else keep[:, None, :, None]
  after = chunks.add_keys(
    maps.key, constants, joined(state), *by_head, position, keep, PLAIN
  )
  after = parted(after)._replace(length=position + key.shape[1])
  out = jnp.where(is_bad, jnp.nan, out)
  return jnp.moveaxis(out, 3, 1), after


def _never_refuses(*args, **kwargs) -> None:
  """No reason not to run."""
  del args, kwargs


class Implementation(NamedTuple):
  """One way to attend.

  Attributes:
    run: maps and attends. Takes maps, constants, the state, query
      ``[B, T, N, G, H]``, key, value, key_mask, segment_ids (a pair or None),
      is_causal and chunk (None for a default); returns ``[B, T, N, G, V]`` and
      the state after.
    refuses: with the same arguments, says why it cannot run; None if it can.
  """

  run: Callable
  refuses: Callable[..., str | None] = _never_refuses


# In the order in which implementation=None tries them. Pallas comes after what
# always runs: it is for those who ask, until a measurement says otherwise.
IMPLEMENTATIONS: dict[str, Implementation] = {
  "xla": Implementation(_xla),
  "reference": Implementation(_reference),
} | {
  f"pallas_{platform}": Implementation(kernels.run, kernels.refuses)
  for platform, kernels in pallas.KERNELS.items()
}


def names_of(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
  """The names asked for, in order; ValueError for an unknown one."""
  if implementation is None:
    return tuple(IMPLEMENTATIONS)
  names = (
    (implementation,)
    if isinstance(implementation, str)
    else tuple(implementation)
  )
  if not names:
    raise ValueError("implementation must name at least one, got ().")
  for name in names:
    if name not in IMPLEMENTATIONS:
      raise ValueError(
        f"Unknown implementation {name!r}.{nearest(name, IMPLEMENTATIONS)}"
      )
  return names
