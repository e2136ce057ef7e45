"""Attention whose weights are dot products of features, by sums over keys.

Read `reference` first. `api` checks arguments, `implementations` chooses among
`reference`, `xla` (the default) and `pallas`. `state` defines the sums that one
call passes to the next.
"""

from spectraformer_jax.linear_attention.api import linear_attention
from spectraformer_jax.linear_attention.implementations import IMPLEMENTATIONS
from spectraformer_jax.linear_attention.platforms import for_platform
from spectraformer_jax.linear_attention.state import State

__all__ = ["IMPLEMENTATIONS", "State", "for_platform", "linear_attention"]
