"""Applies functions of single tokens in blocks of tokens, to save memory.

Works around XLA's choice to keep, for the backward pass, the hidden values of a
whole batch. Remove this module once ``python benchmarks/train_step.py`` needs
no more memory or time with a plain call of `function` instead of the loop. The
loop reduced the memory of the text model's training step to two thirds, and its
time to 7/8.
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_policies

from spectraformer_jax.meshes import is_on_explicit_axes
from spectraformer_jax.typing import Array

# Tokens in a block, so that a block's hidden values fit a CPU's cache.
BLOCK = 2048

# `jax.ad_checkpoint.checkpoint_name` of values that are kept for the backward
# pass: dropout's booleans, which are small, and slow to draw again.
SAVED = "saved_by_token"


def by_token(
  module: nn.Module, function: Callable[[nn.Module, Array], Array], x: Array
) -> Array:
  """Computes `function(module, x)`, which maps each token by itself, in blocks.

  The backward pass recomputes the values of one block at a time, so that hidden
  values of a whole batch never exist. Up to `BLOCK` tokens are one block; then
  nothing is recomputed.

  Args:
    module: the module whose submodules `function` calls.
    function: maps ``[..., D]`` to ``[..., E]``.
    x: ``[B, T, D]``.

  Returns:
    ``[B, T, E]``.
  """
  if is_on_explicit_axes(x):
    return function(module, x)  # axes divided over devices cannot be joined
  tokens = x.reshape(-1, x.shape[-1])
  num_tokens = tokens.shape[0]
  # In an exported program the number may be a symbol: then use one block.
  num_blocks = -(-num_tokens // BLOCK) if isinstance(num_tokens, int) else 1
  if num_blocks <= 1:
    return function(module, x)
  tokens = jnp.pad(tokens, ((0, num_blocks * BLOCK - num_tokens), (0, 0)))

  def step(module: nn.Module, _: None, block: Array) -> tuple[None, Array]:
    return None, function(module, block)

  # prevent_cse=True would keep XLA from merging the recomputation of a block
  # with its first computation. Inside a loop, XLA does not merge them anyway.
  recomputed_step = nn.remat(
    step,
    prevent_cse=False,
    policy=checkpoint_policies.save_only_these_names(SAVED),
  )
  loop = nn.scan(
    recomputed_step,
    variable_broadcast="params",
    split_rngs={"params": False, "dropout": True},
  )
  _, out = loop(module, None, tokens.reshape(num_blocks, BLOCK, -1))
  return out.reshape(-1, out.shape[-1])[:num_tokens].reshape(*x.shape[:-1], -1)
