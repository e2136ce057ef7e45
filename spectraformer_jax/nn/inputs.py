"""What modules are given: checks, and padding taken out."""

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax import checks
from spectraformer_jax.typing import Array


def check_flags(**flags: bool) -> None:
  """ValueError for a flag that is not known when the program is built."""
  for name, value in flags.items():
    if isinstance(value, jax.core.Tracer):
      raise ValueError(
        f"{name} must be a Python bool, got a traced value; nn.remat traces "
        "keyword arguments: give it a function, nn.remat(lambda layer, x: "
        f"layer(x, {name}=True))(layer, x)."
      )


def without_padding(x: Array, mask: Array | None) -> Array:
  """Vectors with zeros where padding was: NaN there would reach gradients.

  A gradient of zero times what padding holds is NaN where that is NaN.

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
  """Mask and segments as arrays; ValueError unless they are ``[B, T]``.

  Args:
    x: ``[B, T, D]``.
    mask: bool, or None.
    segment_ids: ints, or None.
    name: of x, for the message.
  """
  if x.ndim != 3:
    raise ValueError(
      f"{name} must be [batch, length, width], got {name}.shape={x.shape}."
    )
  if mask is not None:
    mask = jnp.asarray(mask)
    checks.check_key_mask(mask, x, "mask" if name == "x" else f"{name}_mask")
  if segment_ids is not None:
    segment_ids = jnp.asarray(segment_ids)
    if segment_ids.shape != x.shape[:2] or not jnp.issubdtype(
      segment_ids.dtype, jnp.integer
    ):
      raise ValueError(
        f"segment_ids must be ints [batch, length] = {list(x.shape[:2])}, got "
        f"{segment_ids.dtype} of shape {segment_ids.shape}."
      )
  return mask, segment_ids


def check_tokens(tokens: Array, name: str = "tokens") -> Array:
  """The tokens as an array; ValueError unless they are ints ``[B, T]``."""
  # Numpy keeps what 32 bits would wrap.
  tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
  is_int = jnp.issubdtype(tokens.dtype, jnp.integer) or not tokens.size
  if tokens.ndim != 2 or not is_int:
    raise ValueError(
      f"{name} must be ints [batch, length], got {tokens.dtype} of shape "
      f"{tokens.shape}."
    )
  return tokens


def check_length(length: Array, tokens: Array, name: str = "length") -> Array:
  """The lengths as an array; ValueError unless they are ints ``[B]``.

  Args:
    length: one number for each row.
    tokens: ``[B, T]``.
    name: for the message.
  """
  length = jnp.asarray(length)
  if length.shape != tokens.shape[:1] or not (
    jnp.issubdtype(length.dtype, jnp.integer) or not length.size
  ):
    raise ValueError(
      f"{name} must be ints [batch] = [{tokens.shape[0]}], one for each row of "
      f"tokens, got {length.dtype} of shape {length.shape}."
    )
  return length


def token_ids(
  tokens: Array, vocab_size: int, mask: Array | None, name: str = "tokens"
) -> Array:
  """Rows of the table of embeddings, int32 ``[B, T]``.

  Args:
    tokens: ints ``[B, T]``.
    vocab_size: tokens are below it.
    mask: ``[B, T]``, True at real positions; None for all.
    name: for the message.

  Returns:
    The tokens; 0 where padding is, whatever it holds, and `vocab_size`, whose
    embedding is NaN, for other tokens that are no token.

  Raises:
    ValueError: such a token where tokens and mask are known before the program
      runs.
  """
  values, real = known(tokens), True if mask is None else known(mask)
  if values is not None and real is not None:
    wrong = values[((values < 0) | (values >= vocab_size)) & real]
    if wrong.size:
      raise ValueError(
        f"{name} must be in [0, vocab_size={vocab_size}), got {wrong[0]}."
      )
  tokens = jnp.asarray(tokens)
  if tokens.dtype.itemsize < 4:
    tokens = tokens.astype(jnp.int32)
  ids = jnp.where((tokens >= 0) & (tokens < vocab_size), tokens, vocab_size)
  if mask is not None:
    ids = jnp.where(mask, ids, 0)
  return ids.astype(jnp.int32)


def known(x: Array) -> np.ndarray | None:
  """The values, where they are known before the program runs."""
  if isinstance(x, jax.core.Tracer):
    return None
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    return None
  return np.asarray(jax.device_get(x))
