"""All implementations of attention, and the choice of the one that runs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from spectraformer_jax.linear_attention import reference
from spectraformer_jax.linear_attention.inputs import Call
from spectraformer_jax.linear_attention.pallas.implementation import KERNELS
from spectraformer_jax.linear_attention.state import State
from spectraformer_jax.linear_attention.xla import implementation as xla
from spectraformer_jax.registry import nearest
from spectraformer_jax.typing import Array


class Implementation(NamedTuple):
  """One implementation of attention.

  Attributes:
    run: returns outputs ``[B, T, N, G, V]``, in float32 or value's dtype, and
      the state after all keys.
    refuses: returns why `run` cannot take a call; None if it can.
  """

  run: Callable[[Call], tuple[Array, State]]
  refuses: Callable[[Call], str | None] = lambda call: None


# In the order in which implementation=None tries them. "xla" takes every call,
# so Pallas runs only where the caller names it. The order may change once a
# measurement shows that Pallas is faster.
IMPLEMENTATIONS: dict[str, Implementation] = {
  "xla": Implementation(xla.attend),
  "reference": Implementation(reference.attend),
} | {
  f"pallas_{platform}": Implementation(kernels.run, kernels.refuses)
  for platform, kernels in KERNELS.items()
}


def run_first(names: Sequence[str], call: Call) -> tuple[Array, State]:
  """Attends by the first implementation that can run; see `Implementation`.

  Raises:
    ValueError: none can; the message gives the reason of each.
  """
  reasons = []
  for name in names:
    run, refuses = IMPLEMENTATIONS[name]
    reason = refuses(call)
    if reason is None:
      return run(call)
    reasons.append(f"implementation {name!r} cannot run: {reason}")
  raise ValueError("; ".join(reasons) + ".")


def names_of(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
  """Returns the names to try, in order; raises ValueError for unknown ones."""
  if implementation is None:
    return tuple(IMPLEMENTATIONS)
  is_one = isinstance(implementation, str)
  names = (implementation,) if is_one else tuple(implementation)
  if not names:
    raise ValueError("implementation must name at least one, got ().")
  for name in names:
    if name not in IMPLEMENTATIONS:
      raise ValueError(
        f"Unknown implementation {name!r}.{nearest(name, IMPLEMENTATIONS)}"
      )
  return names
