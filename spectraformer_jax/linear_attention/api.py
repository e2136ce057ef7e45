"""The public call, and what it shares with `spectral_attention`."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, overload

import jax
import jax.numpy as jnp

from spectraformer_jax import checks, meshes
from spectraformer_jax.linear_attention.empty import attend_empty
from spectraformer_jax.linear_attention.implementations import (
  first_that_runs,
  names_of,
)
from spectraformer_jax.linear_attention.state import (
  Maps,
  State,
  empty_state,
  with_rest,
)
from spectraformer_jax.typing import Array, LogFeatures, PyTree


# What comes out is known from `return_state`.
@overload
def linear_attention(
  query_features: Array,
  key_features: Array,
  value: Array,
  *,
  is_causal: bool = False,
  key_mask: Array | None = None,
  segment_ids: Array | tuple[Array, Array] | None = None,
  initial_state: State | None = None,
  return_state: Literal[False] = False,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Array: ...


@overload
def linear_attention(
  query_features: Array,
  key_features: Array,
  value: Array,
  *,
  is_causal: bool = False,
  key_mask: Array | None = None,
  segment_ids: Array | tuple[Array, Array] | None = None,
  initial_state: State | None = None,
  return_state: Literal[True],
  chunk_size: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> tuple[Array, State]: ...


def linear_attention(
  query_features: Array,
  key_features: Array,
  value: Array,
  *,
  is_causal: bool = False,
  key_mask: Array | None = None,
  segment_ids: Array | tuple[Array, Array] | None = None,
  initial_state: State | None = None,
  return_state: bool = False,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Array | tuple[Array, State]:
  r"""Normalized linear attention on features that exist already, O(T).

  .. math::
    o_i = \frac{\phi_i \cdot \sum_j \psi_j v_j^\top}{\phi_i \cdot \sum_j \psi_j}

  over the keys j that query i sees. Features should be non-negative; where a
  signed map makes a normalizer cancel, `spectral_attention` guards it.

  Args:
    query_features: phi, ``[B, T, N, F]``, any float dtype; N may be a multiple
      of the keys' heads (grouped-query attention).
    key_features: psi, ``[B, S, N, F]``.
    value: ``[B, S, N, V]``.
    is_causal: query i sees keys 0..i: keys from T on are seen by nobody, and
      queries from S on see all.
    key_mask: ``[B, S]`` bool, True where a key may be seen. Hidden keys and
      values may hold anything, NaN included.
    segment_ids: ints ``[B, T]`` of packed rows (T == S), or a pair
      ``([B, T], [B, S])``; a query sees keys of its own segment only.
    initial_state: of an earlier call with `return_state`: its keys come first.
    return_state: also return the state after all S keys.
    chunk_size: positions in one chunk; None is a default for the backend.
      Changes speed and memory, not the result.
    implementation: "xla", "reference", "pallas_tpu", "pallas_gpu", a sequence
      tried in order, or None for the best available. Changes speed, not the
      result.

  Returns:
    ``[B, T, N, V]`` in value's dtype; sums are float32. A query that sees no
    key gives zeros, and zero gradients. With `return_state`, a pair with the
    `State`.

  Raises:
    ValueError: shapes that do not agree, arrays that are not float, a mask over
      query and key positions, a state of other sizes or together with segments,
      or an implementation that is unknown or cannot run; the message says why.

  References:
    Katharopoulos et al., Transformers are RNNs, 2020, equations 5 and 9
    (2006.16236).

  Example:
    >>> phi = jnp.ones((1, 5, 2, 8))
    >>> linear_attention(phi, phi, jnp.ones((1, 5, 2, 4)), is_causal=True).shape
    (1, 5, 2, 4)
  """
  query_features, key_features, value = checks.as_floats(
    query_features=query_features, key_features=key_features, value=value
  )
  key_mask = checks.as_array(key_mask)
  segment_ids = checks.as_segment_ids(segment_ids)
  checks.check_bool("is_causal", is_causal)
  checks.check_bool("return_state", return_state)
  checks.check_attention_inputs(
    query_features, key_features, value, depth="feature dim"
  )
  if checks.is_empty(query_features, key_features, value):
    return attend_empty(
      functools.partial(
        linear_attention,
        is_causal=is_causal,
        chunk_size=chunk_size,
        implementation=implementation,
      ),
      query_features,
      key_features,
      value,
      key_mask=key_mask,
      initial_state=initial_state,
      return_state=return_state,
      segment_ids=segment_ids,
    )
  out, state = _linear_attention(
    query_features,
    key_features,
    value,
    key_mask,
    segment_ids,
    initial_state,
    options=AttendOptions(
      is_causal=is_causal,
      return_state=return_state,
      chunk_size=chunk_size,
      implementation=names_of(implementation),
      is_signed=False,
    ),
  )
  return (out, state) if return_state else out


@functools.partial(jax.jit, static_argnames=("options",))
def _linear_attention(
  query, key, value, key_mask, segment_ids, initial_state, *, options
):
  """`linear_attention` on checked arguments."""

  def on_one_device(query, key, value, constants, initial_state, masks):
    key_mask, segment_ids = masks
    return attend(
      _PLAIN,
      constants,
      query,
      key,
      value,
      key_mask=key_mask,
      segment_ids=segment_ids,
      initial_state=initial_state,
      options=options,
    )

  return meshes.on_shards(
    on_one_device,
    query,
    key,
    value,
    by_head=(),
    by_row=initial_state,
    by_example=(key_mask, segment_ids),
  )


def _plain(constants: PyTree, x: Array, position: Array) -> LogFeatures:
  """Features that exist already."""
  del constants, position
  return LogFeatures(None, x.astype(jnp.float32))


_PLAIN = Maps(_plain, _plain)


@dataclasses.dataclass(frozen=True)
class AttendOptions:
  """The static arguments of `attend`; see `linear_attention`.

  Attributes:
    is_signed: features can be negative: guard the normalizer.
    is_causal, return_state, chunk_size, implementation: as there, with
      implementation a tuple of names.
  """

  is_causal: bool
  return_state: bool
  chunk_size: int | None
  implementation: tuple[str, ...]
  is_signed: bool


# Jitted, so that calls outside of jit are compiled once as well.
@functools.partial(jax.jit, static_argnames=("maps", "options"))
def attend(
  maps: Maps,
  constants: PyTree,
  query: Array,
  key: Array,
  value: Array,
  *,
  key_mask: Array | None,
  segment_ids: Array | tuple[Array, Array] | None,
  initial_state: State | None,
  options: AttendOptions,
) -> tuple[Array, State | None]:
  """Maps and attends.

  Args:
    maps: feature maps of the two sides, static.
    constants: what the maps need; takes gradients.
    query: ``[B, T, N G, H]``: G queries share a key head.
    key: ``[B, S, N, H]``.
    value: ``[B, S, N, V]``.
    key_mask: see `linear_attention`.
    segment_ids: see `linear_attention`.
    initial_state: see `linear_attention`.
    options: the rest.

  Returns:
    ``[B, T, N G, V]`` in value's dtype and the state after all keys (None
    where segments leave no single one).
  """
  checks.check_key_mask(key_mask, key)
  if options.chunk_size is not None:
    checks.check_positive_int("chunk_size", options.chunk_size)
  if segment_ids is not None:
    segment_ids = checks.split_segment_ids(segment_ids, query, key)
    if initial_state is not None or options.return_state:
      raise ValueError(
        "segment_ids cannot be combined with initial_state or return_state: "
        "a state is the sum of one row."
      )
  batch, length, all_heads, _ = query.shape
  heads, value_dim = key.shape[2], value.shape[3]
  if key_mask is not None:
    visible = key_mask[:, :, None, None]
    key, value = jnp.where(visible, key, 0), jnp.where(visible, value, 0)
  if initial_state is None:
    initial_state = start(maps, constants, key, value_dim, options.is_signed)
    if options.return_state:
      initial_state = with_rest(initial_state)
  else:
    of_maps = start(maps, constants, key, value_dim, options.is_signed)
    _check_state(initial_state, of_maps)
  run = first_that_runs(
    options.implementation,
    maps,
    constants,
    initial_state,
    query.reshape(batch, length, heads, all_heads // heads, -1),
    key,
    value,
    key_mask,
    segment_ids,
    is_causal=options.is_causal,
    chunk=options.chunk_size,
  )
  out, state = run()
  out = out.reshape(batch, length, all_heads, value_dim).astype(value.dtype)
  return out, state if options.return_state else None


def start(
  maps: Maps,
  constants: PyTree,
  key: Array,
  value_dim: int,
  is_signed: bool,
) -> State:
  """The state before any key, of the size that the maps need."""
  batch, _, heads, dim = key.shape
  one = jax.ShapeDtypeStruct((batch, heads, 1, dim), jnp.float32)
  shapes = jax.eval_shape(maps.key, constants, one, 0)
  sizes = [leaf.shape[-1] for leaf in jax.tree.leaves(shapes)]
  exponent = shapes.log_magnitude
  return empty_state(
    batch,
    heads,
    max(sizes),
    value_dim,
    exponent_dim=1 if exponent is None else exponent.shape[-1],
    is_signed=is_signed,
  )


def _check_state(state: State, expected: State) -> None:
  """ValueError unless the state is one of this map and these sizes."""
  if not isinstance(state, State):
    raise ValueError(
      "initial_state must be a State, as init_state and return_state make it, "
      f"got {type(state).__name__}."
    )
  if (state.magnitude is None) != (expected.magnitude is None):
    kinds = "signed", "positive"
    had, needs = kinds if expected.magnitude is None else kinds[::-1]
    raise ValueError(
      f"initial_state is of a {had} feature map, this one is {needs}: a state "
      "belongs to the map that made it."
    )
  for name in ("kv", "total", "exponent"):
    got, want = getattr(state, name).shape, getattr(expected, name).shape
    if got != want:
      raise ValueError(
        "initial_state must have [batch, heads, features, value_dim] = "
        f"{list(expected.kv.shape)}, got {name}.shape={got}, not {want}."
      )
