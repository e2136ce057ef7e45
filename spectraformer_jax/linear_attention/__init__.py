"""Attention on features: a dot product, so sums over keys are all it needs.

`api` checks and chooses; `reference` is the quadratic oracle; `bidirectional`
and `causal` map and sum chunk by chunk (`chunks`, `products`, `state`);
`segments` does packed rows.
"""

from spectraformer_jax.linear_attention.api import linear_attention
from spectraformer_jax.linear_attention.implementations import IMPLEMENTATIONS
from spectraformer_jax.linear_attention.state import State

__all__ = ["IMPLEMENTATIONS", "State", "linear_attention"]
