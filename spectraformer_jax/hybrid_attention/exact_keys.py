"""The keys that hybrid attention treats exactly, and checks of the choice."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.typing import Array

# An int for both sides, or (left, right).
Window = int | tuple[int, int] | None


class ExactKeys(NamedTuple):
  """Which keys each query sees exactly; static.

  Attributes:
    window: (left, right): positions before and after a query's own, whose keys
      are exact, like its own key; None: no window.
    num_sinks: number of first visible keys of each sequence that are exact.
    num_heavy: number of keys with the largest `selection.heavy_score` that are
      exact.
  """

  window: tuple[int, int] | None = None
  num_sinks: int = 0
  num_heavy: int = 0

  @property
  def are_none(self) -> bool:
    """Whether no key is exact."""
    return self == ExactKeys()

  def within(self, num_keys: int) -> "ExactKeys":
    """Returns the same choice among so many keys, without larger numbers.

    Arrays have a place for each key of the window and for each sink and heavy
    key, whether there is such a key or not.
    """
    window, limit = self.window, lambda number: min(number, num_keys)
    if window is not None:
      window = limit(window[0]), limit(window[1])
    return ExactKeys(window, limit(self.num_sinks), limit(self.num_heavy))

  @property
  def left(self) -> int:
    """Positions of the window before the query's own; 0 without a window."""
    return 0 if self.window is None else self.window[0]

  @property
  def right(self) -> int:
    """Positions of the window after the query's own; 0 without a window."""
    return 0 if self.window is None else self.window[1]

  def is_near(self, offset: Array) -> Array:
    """Returns whether the window holds a key, bool of the shape of `offset`.

    Args:
      offset: position of the query minus position of the key.
    """
    if self.window is None:
      return jnp.zeros(offset.shape, bool)
    return (offset <= self.left) & (offset >= -self.right)


def exact_keys_of(
  window: Any, num_sinks: int, num_heavy: int, *, is_causal: bool
) -> ExactKeys:
  """Returns the exact keys that arguments of `spectral_attention` choose.

  Args:
    window: None, an int for both sides, or (left, right).
    num_sinks: see `ExactKeys`.
    num_heavy: see `ExactKeys`.
    is_causal: whether no query sees later keys; `right` is 0 then.

  Raises:
    ValueError: an argument has another form.
  """
  for name, number in (("num_sinks", num_sinks), ("num_heavy", num_heavy)):
    if not _is_count(number):
      raise ValueError(f"{name} must be an int of 0 or more, got {number!r}.")
  check_window("window", window)
  if window is None:
    return ExactKeys(None, int(num_sinks), int(num_heavy))
  left, right = _sides(window)
  left, right = int(left), 0 if is_causal else int(right)
  return ExactKeys((left, right), int(num_sinks), int(num_heavy))


def check_window(name: str, window: Any) -> None:
  """Raises ValueError unless a window is None, an int >= 0, or a pair of such.

  Args:
    name: of the argument, for the message.
    window: its value.
  """
  if window is not None and not all(map(_is_count, _sides(window))):
    raise ValueError(
      f"{name} must be None, an int of 0 or more, or a pair (left, right) of "
      f"such, got {window!r}."
    )


def _sides(window: Any) -> tuple[Any, Any]:
  """Returns left and right."""
  if isinstance(window, tuple | list) and len(window) == 2:
    return window[0], window[1]
  return window, window


def check_exact_keys(
  exact: ExactKeys,
  arrays: AttentionArrays,
  *,
  is_causal: bool,
  has_state: bool,
) -> None:
  """Raises ValueError unless a call may have these exact keys.

  Args:
    exact: the choice.
    arrays: of the call.
    is_causal: whether no query sees later keys.
    has_state: whether the call takes or returns a state.
  """
  query, key, ids = arrays.query, arrays.key, arrays.segment_ids
  if exact.window is not None and query.shape[1] != key.shape[1]:
    raise ValueError(
      f"window needs query and key of one length, got query.shape="
      f"{query.shape}, key.shape={key.shape}; num_sinks and num_heavy do not."
    )
  if (
    exact.window is not None and isinstance(ids, tuple) and ids[0] is not ids[1]
  ):
    raise ValueError(
      "window needs the same segment_ids for queries and keys, got a pair of "
      "arrays; pass one array [B, T], or use num_sinks."
    )
  check_heavy(
    exact, is_causal=is_causal, is_packed=ids is not None, has_state=has_state
  )
  if has_state and not is_causal:
    raise ValueError(
      "window and num_sinks carry over in a state only with is_causal=True."
    )


def check_heavy(
  exact: ExactKeys,
  *,
  is_causal: bool,
  is_packed: bool = False,
  has_state: bool = False,
) -> None:
  """Raises ValueError for heavy keys where they cannot be chosen.

  Args:
    exact: the choice.
    is_causal: whether no query sees later keys.
    is_packed: whether rows have segments.
    has_state: whether the call takes or returns a state.
  """
  if not exact.num_heavy:
    return
  for is_set, setting, reason in (
    (
      is_causal,
      "is_causal=True",
      "which keys are heavy depends on later ones; use num_sinks",
    ),
    (
      is_packed,
      "segment_ids",
      "its scores would mix packed rows; use window and num_sinks",
    ),
    (
      has_state,
      "initial_state or return_state",
      "a state keeps no keys to choose from",
    ),
  ):
    if is_set:
      raise ValueError(
        f"num_heavy cannot be combined with {setting}: {reason}."
      )


def kernel_of(component: Any) -> str:
  """Returns the exact kernel of a component: "softmax" or "gaussian".

  Raises:
    ValueError: the component estimates another kernel, so its features and
      exact weights would share no scale.
  """
  kernel = getattr(component, "kernel", None)
  if kernel is None:
    raise ValueError(
      f"component {component.info.name!r} estimates a kernel of its own, so "
      "exact keys and features share no scale: window, num_sinks and num_heavy "
      "need a component of the softmax or Gaussian kernel, such as 'asderf' or "
      "'posrf'."
    )
  return kernel


def _is_count(number: Any) -> bool:
  """Whether `number` is an int (or NumPy's) of 0 or more."""
  is_int = isinstance(number, int | np.integer) and not isinstance(number, bool)
  return is_int and bool(number >= 0)
