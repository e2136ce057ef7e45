"""The state of linear attention: sums over keys, in two layouts."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.linear_attention.exponents import LOWEST, power_of_two
from spectraformer_jax.typing import Array


class State(NamedTuple):
  """Sums over the keys seen so far; float32, its size does not grow.

  Exponential features are multiplied by ``2 ** (KEY_EXPONENT - exponent)``,
  where the exponent is at least the largest one of this feature among the keys
  so far. Plain features are not scaled.

  Attributes:
    kv: sum of key features times values, ``[B, N, F, V]``.
    total: sum of key features, ``[B, N, F]``.
    magnitude: sum of absolute key features, ``[B, N, F]``, for signed maps;
      None for positive ones.
    exponent: exponent of the power of two divided out, ``[B, N, F]``, or
      ``[B, N, 1]`` where all features share it.
    length: number of positions seen so far, int32 scalar.
    rest: rounding errors of `kv` and, in the last column, of `total`,
      ``[B, N, F, V + 1]``. They are added together with the next keys, because
      a million roundings may all go the same way. None: they are dropped.
  """

  kv: Array
  total: Array
  magnitude: Array | None
  exponent: Array
  length: Array
  rest: Array | None = None


# The sums that outputs are linear in: `JoinedState.sums` and `magnitude`.
Linear = tuple[Array, Array | None]


class JoinedState(NamedTuple):
  """A `State` in the layout of the loops, where one product computes both sums.

  Attributes:
    sums: `State.kv` with `State.total` as one more column,
      ``[B, N, F, V + 1]``.
    magnitude: see `State`.
    exponent: see `State`.
    length: see `State`.
    rest: see `State`.
    segment: id of the segment that the sums belong to, ``[B]``; None: there
      are no segments.
  """

  sums: Array
  magnitude: Array | None
  exponent: Array
  length: Array
  rest: Array | None
  segment: Array | None = None

  @property
  def linear(self) -> Linear:
    """The sums that outputs are linear in; only they take gradients."""
    return self.sums, self.magnitude

  def with_linear(self, linear: Linear) -> "JoinedState":
    """Returns the state with other sums."""
    return self._replace(sums=linear[0], magnitude=linear[1])


def join_sums(state: State) -> JoinedState:
  """Appends `total` to `kv` as the last column.

  Exponent and rest take no gradient.
  """
  exponent, rest = jax.lax.stop_gradient((state.exponent, state.rest))
  sums = jnp.concatenate([state.kv, state.total[..., None]], axis=-1)
  return JoinedState(sums, state.magnitude, exponent, state.length, rest)


def split_sums(state: JoinedState) -> State:
  """Undoes `join_sums`."""
  kv, total = state.sums[..., :-1], state.sums[..., -1]
  return State(
    kv, total, state.magnitude, state.exponent, state.length, state.rest
  )


def rescale(state: JoinedState, exponent: Array) -> JoinedState:
  """Returns the same sums, relative to a larger exponent."""
  factor = power_of_two(state.exponent - exponent)
  return state._replace(
    sums=state.sums * factor[..., None],
    magnitude=None if state.magnitude is None else state.magnitude * factor,
    exponent=exponent,
    rest=None if state.rest is None else state.rest * factor[..., None],
  )


def with_rest(state: State) -> State:
  """Returns the state with a `rest` of zero."""
  kv = state.kv
  rest = jnp.zeros_like(kv, shape=(*kv.shape[:-1], kv.shape[-1] + 1))
  return state._replace(rest=rest)


def add_exactly(total: Array, part: Array, rest: Array) -> tuple[Array, Array]:
  """Returns ``total + part + rest`` rounded, and its rounding error."""
  part = part + rest
  # Behind the barrier the sum is rounded once, so the error is that of `new`.
  new = jax.lax.optimization_barrier(total + part)
  return new, jax.lax.stop_gradient(part - (new - total))


def empty_state(
  batch: int,
  heads: int,
  feature_dim: int,
  value_dim: int,
  *,
  exponent_dim: int,
  is_signed: bool,
) -> State:
  """Returns the state before any key."""
  sums = jnp.zeros((batch, heads, feature_dim), jnp.float32)
  return State(
    kv=jnp.zeros((batch, heads, feature_dim, value_dim), jnp.float32),
    total=sums,
    magnitude=sums if is_signed else None,
    exponent=jnp.full((batch, heads, exponent_dim), LOWEST, jnp.float32),
    length=jnp.zeros((), jnp.int32),
  )
