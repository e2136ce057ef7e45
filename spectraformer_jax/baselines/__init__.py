"""Other efficient attentions, to compare with: pure functions.

Outputs do not depend on the number of masked positions or on their content, NaN
included, nor on other examples of the batch. One exception: the blocks of
`local_attention` and the projections of `linformer_attention` count positions
from the start of the sequence, so padding in front moves them. The argument
`attention` of `SpectralSelfAttention` takes a name of `BASELINES`.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from spectraformer_jax.baselines.linformer import (
  linformer_attention,
  linformer_projections,
)
from spectraformer_jax.baselines.local import local_attention
from spectraformer_jax.baselines.nystromformer import nystromformer_attention
from spectraformer_jax.baselines.skyformer import skyformer_attention
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array

__all__ = [
  "BASELINES",
  "Baseline",
  "check_options",
  "linformer_attention",
  "linformer_projections",
  "local_attention",
  "nystromformer_attention",
  "skyformer_attention",
]


@dataclasses.dataclass(frozen=True)
class Baseline:
  """How a module runs a baseline.

  Attributes:
    attend: ``(query, key, value, *, key_mask, ...) -> output``.
    options: names of the keyword arguments that a user may set.
    init_params: ``(rng, *, num_heads, max_len, **options)`` -> learnable
      keyword arguments of `attend`, which then takes no options; None: the
      baseline has no parameters.
    can_be_causal: whether `attend` takes `is_causal`.
  """

  attend: Callable[..., Array]
  options: tuple[str, ...]
  init_params: Callable[..., dict[str, Array]] | None = None
  can_be_causal: bool = False


BASELINES = {
  "linformer": Baseline(
    linformer_attention,
    ("projected_length", "share_key_value"),
    init_params=linformer_projections,
  ),
  "local": Baseline(
    local_attention, ("block_size", "neighbours"), can_be_causal=True
  ),
  "nystromformer": Baseline(
    nystromformer_attention, ("num_landmarks", "iterations")
  ),
  "skyformer": Baseline(
    skyformer_attention, ("num_landmarks", "regularisation", "iterations")
  ),
}


def check_options(
  attention: str, options: Mapping[str, Any], *, is_causal: bool = False
) -> None:
  """Raises ValueError for an option that `attention` does not have.

  Args:
    attention: a name of `BASELINES`; any other name has no options.
    options: those of ``attention_kwargs``.
    is_causal: whether attention will be causal.

  Example:
    >>> check_options("local", {"block_size": 64})
  """
  baseline = BASELINES.get(attention)
  known = baseline.options if baseline else ()
  for name in options:
    if name not in known:
      raise ValueError(
        f"attention={attention!r} has no option {name!r}."
        f"{nearest(name, known) if known else ' It takes none.'}"
      )
  if is_causal and baseline and not baseline.can_be_causal:
    raise ValueError(
      f"attention={attention!r} cannot be causal: it mixes positions before "
      "it attends; use 'spectral', 'local' or an exact kernel."
    )
