"""Checks the arguments of modules, and removes the content of padding."""

from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from spectraformer_jax import checks
from spectraformer_jax.typing import Array

# Token ids. A NumPy array keeps large ids, which would wrap around in the 32
# bits of a JAX array, so that they can be refused.
Tokens: TypeAlias = Array | np.ndarray


def check_flags(**flags: bool) -> None:
  """Raises ValueError for a flag that is a traced value."""
  for name, value in flags.items():
    if isinstance(value, Tracer):
      raise ValueError(
        f"{name} must be a Python bool, got a traced value; nn.remat traces "
        "keyword arguments: give it a function, nn.remat(lambda layer, x: "
        f"layer(x, {name}=True))(layer, x)."
      )


def without_padding(x: Array, mask: Array | None) -> Array:
  """Sets padding to 0.

  Otherwise a NaN in padding would make gradients NaN even where padding has no
  influence, since 0 times NaN is NaN.

  Args:
    x: ``[B, T, D]``.
    mask: ``[B, T]`` bool, True at real positions; None for all.
  """
  return x if mask is None else jnp.where(mask[:, :, None], x, 0)


def check_rows(
  x: Array,
  mask: Array | None,
  segment_ids: Array | None,
  name: str = "x",
) -> tuple[Array | None, Array | None]:
  """Converts mask and segment ids to arrays.

  Args:
    x: ``[B, T, D]``.
    mask: bool ``[B, T]``, or None.
    segment_ids: ints ``[B, T]``, or None.
    name: the name of x in error messages.

  Raises:
    ValueError: another shape or dtype.
  """
  if x.ndim != 3:
    raise ValueError(
      f"{name} must be [batch, length, width], got {name}.shape={x.shape}."
    )
  if mask is not None:
    mask = jnp.asarray(mask)
    checks.check_mask(mask, x, "mask" if name == "x" else f"{name}_mask")
  if segment_ids is not None:
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.shape != x.shape[:2] or not _is_int(segment_ids):
      raise ValueError(
        f"segment_ids must be ints [batch, length] = {list(x.shape[:2])}, got "
        f"{segment_ids.dtype} of shape {segment_ids.shape}."
      )
  return mask, segment_ids


def check_tokens(tokens: Tokens, name: str = "tokens") -> Tokens:
  """Converts tokens to an array; raises ValueError unless ints ``[B, T]``."""
  tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
  if tokens.ndim != 2 or not (_is_int(tokens) or not tokens.size):
    raise ValueError(
      f"{name} must be ints [batch, length], got {tokens.dtype} of shape "
      f"{tokens.shape}."
    )
  return tokens


def check_length(length: Array, tokens: Tokens, name: str = "length") -> Array:
  """Converts lengths to an array; raises ValueError unless ints ``[B]``.

  Args:
    length: one number for each row.
    tokens: ``[B, T]``.
    name: the name of `length` in error messages.
  """
  length = jnp.asarray(length)
  if length.shape != tokens.shape[:1] or not (
    _is_int(length) or not length.size
  ):
    raise ValueError(
      f"{name} must be ints [batch] = [{tokens.shape[0]}], one for each row of "
      f"tokens, got {length.dtype} of shape {length.shape}."
    )
  return length


def real_positions(
  tokens: Tokens, length: Array | None, name: str = "length"
) -> Array | None:
  """Returns bool ``[B, T]``, True before `length`; None if that is None."""
  if length is None:
    return None
  tokens = check_tokens(tokens)
  length = check_length(length, tokens, name)
  return checks.positions_before(length, tokens.shape[1])


def token_ids(
  tokens: Tokens,
  vocab_size: int,
  mask: Array | None,
  name: str = "tokens",
) -> Array:
  """Turns tokens into row numbers of the embedding table.

  Args:
    tokens: ints ``[B, T]``.
    vocab_size: number of rows.
    mask: ``[B, T]``, True at real positions; None for all.
    name: the name of `tokens` in error messages.

  Returns:
    int32 ``[B, T]``: the tokens; 0 at padding; for a real token outside
    [0, vocab_size), `vocab_size`: the table has no such row, so the embedding
    is NaN.

  Raises:
    ValueError: a real token outside [0, vocab_size), if tokens and mask are
      concrete.
  """
  values = checks.concrete(tokens)
  real = True if mask is None else checks.concrete(mask)
  if values is not None and real is not None:
    wrong = values[((values < 0) | (values >= vocab_size)) & real]
    if wrong.size:
      raise ValueError(
        f"{name} must be in [0, vocab_size={vocab_size}), got {wrong[0]}."
      )
  tokens = jnp.asarray(tokens)
  # int8 and int16 may be too small to hold vocab_size.
  if tokens.dtype.itemsize < 4:
    tokens = tokens.astype(jnp.int32)
  ids = jnp.where((tokens >= 0) & (tokens < vocab_size), tokens, vocab_size)
  if mask is not None:
    ids = jnp.where(mask, ids, 0)
  return ids.astype(jnp.int32)


def _is_int(x: Tokens) -> bool:
  return jnp.issubdtype(x.dtype, jnp.integer)
