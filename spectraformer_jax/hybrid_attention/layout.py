"""The arrays of hybrid attention along one row of positions.

Queries and keys share a row. The keys of the window before the first query come
from the state, or are hidden, so that every query has a whole window:

    key:    [ left: earlier keys | T keys, at the queries' positions | right ]
    query:                       [ T queries                         ]

Packed rows are sorted by segment. In a call that is not causal and has no
window, the key array has a length of its own.
"""

from typing import NamedTuple

from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.hybrid_attention.selection import SpecialKeys
from spectraformer_jax.typing import Array


class Row(NamedTuple):
  """The arrays of one call.

  Attributes:
    query: ``[B, T, N, G, H]``; flat in loops, ``[B, T, N G, H]``.
    key: ``[B, left + S + right, N, H]``; hidden ones are zeros.
    value: ``[B, left + S + right, N, V]``.
    key_mask: bool ``[B, left + S + right]``, with a last axis of N heads if
      each has heavy keys of its own: keys that are visible and not special.
    special: sinks and heavy keys.
    segment: ids of the key array's positions, float32 ``[B, left + S + right]``
      with equal ones beside each other; None: one segment.
  """

  query: Array
  key: Array
  value: Array
  key_mask: Array
  special: SpecialKeys
  segment: Array | None

  def mask_by_head(self) -> Array:
    """Returns `key_mask` as ``[B, left + S + right, N or 1]``."""
    mask = self.key_mask
    return mask[..., None] if mask.ndim == 2 else mask


class Setting(NamedTuple):
  """The static facts of one call.

  Attributes:
    exact: which keys are exact.
    is_causal: whether a query sees no key at a later place of its row.
    kernel: "softmax" or "gaussian".
    sqrt_scale: multiplies queries and keys.
    num_rows: M, rows of the feature map.
  """

  exact: ExactKeys
  is_causal: bool
  kernel: str
  sqrt_scale: float
  num_rows: int
