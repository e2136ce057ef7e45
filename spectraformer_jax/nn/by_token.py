"""What happens to each token alone, in blocks of tokens."""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_policies

from spectraformer_jax.meshes import is_on_explicit_axes
from spectraformer_jax.typing import Array

# Tokens in a block. Hidden values of that many fit a CPU's cache.
BLOCK = 2048

# `jax.ad_checkpoint.checkpoint_name` of what the backward pass finds again
# instead of making it again: drawing numbers is dear, and keeping booleans is
# cheap.
KEPT = "kept_by_token"


def by_token(
  module: nn.Module, function: Callable[[nn.Module, Array], Array], x: Array
) -> Array:
  """`function(module, x)`, which maps each token alone, in blocks of tokens.

  The backward pass makes the values of a block again and drops them with it, so
  that hidden values of a whole batch never exist. Few tokens, or none, are one
  block, and nothing is made again.

  Args:
    module: whose submodules `function` calls.
    function: maps ``[..., D] -> [..., E]``.
    x: ``[B, T, D]``.

  Returns:
    ``[B, T, E]``.
  """
  if is_on_explicit_axes(x):
    return function(module, x)  # divided axes cannot be joined
  tokens = x.reshape(-1, x.shape[-1])
  number = tokens.shape[0]
  # In an exported program the number may be a symbol.
  count = -(-number // BLOCK) if isinstance(number, int) else 1
  if count <= 1:
    return function(module, x)
  padded = jnp.pad(tokens, ((0, count * BLOCK - number), (0, 0)))

  def step(module, _, block):
    return None, function(module, block)

  # The loop keeps XLA from merging the two computations of a block.
  again = nn.remat(
    step,
    prevent_cse=False,
    policy=checkpoint_policies.save_only_these_names(KEPT),
  )
  loop = nn.scan(
    again,
    variable_broadcast="params",
    split_rngs={"params": False, "dropout": True},
  )
  _, out = loop(module, None, padded.reshape(count, BLOCK, -1))
  return out.reshape(count * BLOCK, -1)[:number].reshape(*x.shape[:-1], -1)
