"""Hybrid attention: exact weights for some keys, features for all others."""

from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.hybrid_attention import reference, rows, xla
from spectraformer_jax.hybrid_attention.layout import Row, Setting
from spectraformer_jax.hybrid_attention.state import (
  HybridState,
  check_state,
  empty_state,
)
from spectraformer_jax.linear_attention.api import (
  AttendOptions,
  check_sums,
  inputs_of,
  start,
)
from spectraformer_jax.linear_attention.inputs import Maps
from spectraformer_jax.linear_attention.state import State, with_rest
from spectraformer_jax.linear_attention.xla.plan import is_known
from spectraformer_jax.typing import Array, PyTree


def attend(
  maps: Maps,
  setting: Setting,
  options: AttendOptions,
  constants: PyTree,
  initial_state: State | HybridState | None,
  arrays: AttentionArrays,
) -> tuple[Array, HybridState | None]:
  """Attends exactly to some keys, and by features to all others.

  Args:
    maps: complete feature maps of queries and keys: no factor of a query may be
      missing, because it would not cancel against exact weights.
    setting: see `Setting`.
    options: see `AttendOptions`.
    constants: variables of the maps; they take gradients.
    initial_state: see `spectral_attention`.
    arrays: see `AttentionArrays`.

  Returns:
    ``[B, T, N G, V]`` in value's dtype and, with `return_state`, the state
    after all keys (else None).

  Raises:
    ValueError: arguments do not agree, or no implementation can run.
  """
  name = _implementation(options.implementation)
  inputs = inputs_of(options, initial_state is not None, arrays)
  *_, length, _, _, head_dim = inputs.query.shape
  key, value = inputs.key, inputs.value
  value_dim = value.shape[3]
  has_state = initial_state is not None or options.return_state
  if not has_state and is_known(key.shape[1]):
    setting = setting._replace(exact=setting.exact.within(key.shape[1]))
  far = start(maps, constants, key, value_dim, options.is_signed)
  if initial_state is None:
    far = with_rest(far) if options.return_state else far
    state = empty_state(far, setting.exact, head_dim, (key.dtype, value.dtype))
  else:
    state = check_state(initial_state, setting.exact)
    assert isinstance(state, HybridState)  # since the call has exact keys
    check_sums(state.far, far)
  before = state.far

  def run(setting: Setting, row: Row) -> tuple[Array, State]:
    if name == "reference":
      return reference.attend(maps, setting, constants, before, row)
    return xla.attend(maps, setting, options.chunk_size, constants, before, row)

  if inputs.segment_ids is None:
    row = rows.unpacked(setting, inputs, arrays.query_mask, state)
    out, far = run(setting, row)
    out = out[:, :length]
    if options.return_state:
      state = rows.state_after(setting, inputs, row, state, far)
  else:
    is_causal = setting.is_causal
    if setting.exact.window is None:
      # `packed` then sorts the keys of a segment before its queries.
      setting = setting._replace(is_causal=True)
    row, order = rows.packed(setting, inputs, is_causal=is_causal)
    out = order.unsorted(run(setting, row)[0])
  shape = *arrays.query.shape[:3], value_dim
  out = out.reshape(shape).astype(value.dtype)
  return out, state if options.return_state else None


def _implementation(names: tuple[str, ...]) -> str:
  """Returns the first implementation that can run.

  Raises:
    ValueError: none can; the message says why.
  """
  for name in names:
    if name in ("xla", "reference"):
      return name
  raise ValueError(
    "; ".join(
      f"implementation {name!r} cannot run: it knows neither window, num_sinks "
      "nor num_heavy"
      for name in names
    )
    + "."
  )
