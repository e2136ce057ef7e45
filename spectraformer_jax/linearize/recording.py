"""Records what the attention of another person's Flax model gets."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from spectraformer_jax import checks
from spectraformer_jax.study.approximation.inputs import Inputs, make_inputs
from spectraformer_jax.typing import Array


def recording_attention_fn(
  *, is_causal: bool = False
) -> tuple[list[Inputs], Callable[..., Array]]:
  """Makes an `attention_fn` that keeps its arguments, and a list of them.

  The function computes `flax.linen.dot_product_attention`. It serves Linen's
  `MultiHeadDotProductAttention` and NNX's `MultiHeadAttention`. Give the model
  all sequences in one call, outside of `jax.jit`: each call of the function is
  taken for another layer, and is named "layer_0", "layer_1", ... in order.

  Args:
    is_causal: whether queries see keys up to their own, by a mask of the model.

  Returns:
    The list, empty at first, which `write_npz` writes; and the function.

  Raises:
    ValueError: when called with a bias, with dropout, with a mask that hides
      more than some keys, some queries and, if `is_causal`, later keys, or
      inside a transformation such as `jax.jit` or `nn.scan`.

  Example:
    >>> import flax.linen as nn, jax
    >>> layers, fn = recording_attention_fn()
    >>> model = nn.MultiHeadDotProductAttention(num_heads=2, attention_fn=fn)
    >>> x = jnp.ones((1, 5, 8))
    >>> variables = model.init(jax.random.key(0), x)
    >>> layers.clear()  # `init` is a call, too
    >>> _ = model.apply(variables, x)
    >>> [(layer.name, layer.query.shape) for layer in layers]
    [('layer_0', (1, 5, 2, 4))]
  """
  layers: list[Inputs] = []
  return layers, functools.partial(_attend, layers, bool(is_causal))


def _attend(
  layers: list[Inputs],
  has_triangle: bool,
  query: Float[Array, "B T NG H"],
  key: Float[Array, "B S N H"],
  value: Float[Array, "B S N V"],
  bias: Array | None = None,
  mask: Array | None = None,
  broadcast_dropout: bool = True,
  dropout_rng: Array | None = None,
  dropout_rate: float = 0.0,
  deterministic: bool = False,
  dtype: Any = None,
  precision: Any = None,
  module: Any = None,
  is_causal: bool = False,
) -> Array:
  """Attends, with the arguments that Flax passes to its attention_fn.

  Linen looks at their names, and passes those that this function has.
  """
  del broadcast_dropout, dropout_rng  # dropout itself is refused below
  import flax.linen as linen  # only who has such a model needs it

  name = f"layer_{len(layers)}"
  if bias is not None:
    raise ValueError(
      f"{name}: a bias cannot be copied by features: the model must not have "
      "one."
    )
  if dropout_rate and not deterministic:
    raise ValueError(
      f"{name}: dropout_rate={dropout_rate} of attention weights: call the "
      "model with deterministic=True."
    )
  if is_causal:
    mask = _with_triangle(mask, query.shape[-3], key.shape[-3])
  arrays = [checks.concrete(x) for x in (query, key, value)]
  if any(x is None for x in arrays) or (
    mask is not None and checks.concrete(mask) is None
  ):
    raise ValueError(
      f"{name} is called inside a transformation: call the model without "
      "jax.jit, and with a loop in the place of nn.scan over layers."
    )
  key_mask, query_mask = _masks(name, mask, query, key, has_triangle)
  layers.append(
    make_inputs(name, query, key, value, key_mask, query_mask, may_group=True)
  )
  # Flax's function takes as many key heads as query heads.
  groups = query.shape[2] // key.shape[2]
  key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
  return linen.dot_product_attention(
    query,
    key,
    value,
    mask=mask,
    dtype=dtype,
    precision=precision,
    module=module,
  )


def _with_triangle(mask: Array | None, length: int, num_keys: int) -> Array:
  """Returns the mask, without later keys."""
  triangle = jnp.tril(jnp.ones((length, num_keys), bool))
  return triangle if mask is None else jnp.asarray(mask, bool) & triangle


def _masks(
  name: str, mask: Array | None, query: Array, key: Array, has_triangle: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Returns which keys ``[B, S]`` and which queries ``[B, T]`` are real.

  Raises:
    ValueError: the mask has another form.
  """
  batch, length, _, _ = query.shape
  shape = (batch, length, key.shape[1])
  triangle = np.tril(np.ones(shape[1:], bool))
  sees = np.ones(shape, bool)
  if mask is not None:
    of_heads = np.broadcast_to(
      np.asarray(mask, bool), (batch, query.shape[2], *shape[1:])
    )
    sees = of_heads[:, 0]
    if (of_heads != sees[:, None]).any():
      raise ValueError(f"{name}: the mask must be the same for all heads.")
  key_mask = np.asarray(sees.any(axis=1))
  query_mask = np.asarray(sees.any(axis=2))
  real = query_mask[:, :, None] & key_mask[:, None]
  wanted = real & triangle if has_triangle else real
  if (sees == wanted).all():
    return key_mask, query_mask
  if not has_triangle and (sees == (real & triangle)).all():
    raise ValueError(
      f"{name}: the mask is causal: use recording_attention_fn(is_causal=True) "
      "and --causal."
    )
  raise ValueError(
    f"{name}: the mask must hide some queries and some keys from all others"
    f"{', and later keys' if has_triangle else ''}; it hides single pairs."
  )
