"""`linear_attention`, and `attend`, which it shares with spectral attention."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from spectraformer_jax import checks, meshes
from spectraformer_jax.checks import AttentionArrays
from spectraformer_jax.linear_attention.empty import attend_empty
from spectraformer_jax.linear_attention.implementations import (
  names_of,
  run_first,
)
from spectraformer_jax.linear_attention.inputs import (
  Call,
  Inputs,
  Maps,
  PlainFeatures,
)
from spectraformer_jax.linear_attention.state import (
  State,
  empty_state,
  with_rest,
)
from spectraformer_jax.typing import Array, Mask, PyTree, SegmentIds


class LinearOptions(TypedDict, total=False):
  """Keyword arguments of `linear_attention`, except `return_state`."""

  is_causal: bool
  key_mask: Mask
  segment_ids: SegmentIds | None
  initial_state: State | None
  chunk_size: int | None
  implementation: str | Sequence[str] | None


@overload
def linear_attention(
  query_features: Array,
  key_features: Array,
  value: Array,
  *,
  return_state: Literal[False] = False,
  **options: Unpack[LinearOptions],
) -> Array: ...


@overload
def linear_attention(
  query_features: Array,
  key_features: Array,
  value: Array,
  *,
  return_state: Literal[True],
  **options: Unpack[LinearOptions],
) -> tuple[Array, State]: ...


def linear_attention(
  query_features: Float[Array, "B T NG F"],
  key_features: Float[Array, "B S N F"],
  value: Float[Array, "B S N V"],
  *,
  is_causal: bool = False,
  key_mask: Bool[Array, "B S"] | None = None,
  segment_ids: Int[Array, "B T"]
  | tuple[Int[Array, "B T"], Int[Array, "B S"]]
  | None = None,
  initial_state: State | None = None,
  return_state: bool = False,
  chunk_size: int | None = None,
  implementation: str | Sequence[str] | None = None,
) -> Float[Array, "B T NG V"] | tuple[Float[Array, "B T NG V"], State]:
  r"""Computes normalized linear attention on given features, in O(T).

  .. math::
    o_i = \frac{\phi_i \cdot \sum_j \psi_j v_j^\top}{\phi_i \cdot \sum_j \psi_j}

  over the keys j that query i sees. Features should be non-negative:
  `spectral_attention` guards normalizers of signed maps against cancellation,
  this function does not.

  Args:
    query_features: phi, ``[B, T, N, F]``, of any float dtype; N may be a
      multiple of the keys' heads (grouped-query attention).
    key_features: psi, ``[B, S, N, F]``.
    value: ``[B, S, N, V]``.
    is_causal: query i sees keys 0..i. If S > T, no query sees the keys from T
      on; if T > S, the queries from S on see all keys.
    key_mask: ``[B, S]`` bool, True where a key is visible. Hidden keys and
      values may hold anything, NaN included.
    segment_ids: ints ``[B, T]`` of packed rows (T == S), or a pair
      ``([B, T], [B, S])``; a query sees keys of its own segment only.
    initial_state: the state of an earlier call with `return_state`, whose keys
      come first.
    return_state: also return the state after all S keys.
    chunk_size: positions in one chunk; None: the platform's default. It changes
      speed and memory, not the result.
    implementation: "xla", "reference", "pallas_tpu", "pallas_gpu", a sequence
      tried in order, or None for the best available. It changes speed, not the
      result.

  Returns:
    ``[B, T, N, V]`` in value's dtype; sums are float32. A query that sees no
    key gives zeros, and zero gradients. With `return_state`, a pair with the
    `State`.

  Raises:
    ValueError: shapes do not agree, an array is not float, a mask has query and
      key positions, a state has other sizes or comes with segments, or an
      implementation is unknown or cannot run; the message says why.

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
  checks.check_mask(key_mask, key_features)
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
  options = AttendOptions(
    is_causal=is_causal,
    return_state=return_state,
    chunk_size=chunk_size,
    implementation=names_of(implementation),
    is_signed=False,
  )
  arrays = AttentionArrays(
    query_features, key_features, value, key_mask, None, segment_ids
  )
  out, state = _linear_attention(options, initial_state, arrays)
  return (out, state) if return_state else out


@dataclasses.dataclass(frozen=True)
class AttendOptions:
  """The static arguments of `attend`.

  Attributes:
    is_causal: see `linear_attention`.
    return_state: see `linear_attention`.
    chunk_size: see `linear_attention`.
    implementation: names to try, in order.
    is_signed: whether features can be negative; the normalizer is then kept
      away from zero.
  """

  is_causal: bool
  return_state: bool
  chunk_size: int | None
  implementation: tuple[str, ...]
  is_signed: bool


@functools.partial(jax.jit, static_argnames=("options",))
def _linear_attention(
  options: AttendOptions, initial_state: State | None, arrays: AttentionArrays
) -> tuple[Array, State | None]:
  """Computes `linear_attention`, given checked arguments."""

  def on_one_device(
    query: Array,
    key: Array,
    value: Array,
    constants: tuple[()],
    initial_state: State | None,
    masks: tuple,
  ) -> tuple[Array, State | None]:
    arrays = AttentionArrays(query, key, value, *masks)
    return attend(_PLAIN, options, constants, initial_state, arrays)

  return meshes.on_shards(
    on_one_device,
    *arrays[:3],
    by_head=(),
    by_example_and_head=initial_state,
    by_example=arrays[3:],
  )


def _plain(constants: PyTree, x: Array, position: Array) -> PlainFeatures:
  """Returns x as features."""
  del constants, position
  return PlainFeatures(x.astype(jnp.float32))


_PLAIN = Maps(_plain, _plain)


# Jitted, so that layers of equal shapes are traced once.
@functools.partial(jax.jit, static_argnames=("maps", "options"))
def attend(
  maps: Maps,
  options: AttendOptions,
  constants: PyTree,
  initial_state: State | None,
  arrays: AttentionArrays,
) -> tuple[Array, State | None]:
  """Maps queries and keys to features, and attends.

  Args:
    maps: feature maps of queries and keys, static.
    options: see `AttendOptions`.
    constants: variables of the maps; they take gradients.
    initial_state: see `linear_attention`.
    arrays: see `AttentionArrays`; `query_mask` is not used.

  Returns:
    ``[B, T, N G, V]`` in value's dtype and, with `return_state`, the state
    after all keys (else None).
  """
  inputs = inputs_of(options, initial_state is not None, arrays)
  state = start(
    maps, constants, inputs.key, inputs.value.shape[3], options.is_signed
  )
  if initial_state is not None:
    check_sums(initial_state, state)
    state = initial_state
  elif options.return_state:
    state = with_rest(state)
  call = Call(
    maps, options.chunk_size, constants, state, inputs, options.is_causal
  )
  out, state = run_first(options.implementation, call)
  shape, value = arrays.query.shape[:3], arrays.value
  out = out.reshape(*shape, value.shape[3]).astype(value.dtype)
  return out, state if options.return_state else None


def inputs_of(
  options: AttendOptions, has_initial_state: bool, arrays: AttentionArrays
) -> Inputs:
  """Returns the arrays of a call, with zeros for hidden keys and values.

  Raises:
    ValueError: `chunk_size` or the segment ids have another form, or segments
      come with a state.
  """
  query, key, value, key_mask, _, segment_ids = arrays
  if options.chunk_size is not None:
    checks.check_positive_int("chunk_size", options.chunk_size)
  if segment_ids is not None:
    segment_ids = checks.split_segment_ids(segment_ids, query, key)
    if has_initial_state or options.return_state:
      raise ValueError(
        "segment_ids cannot be combined with initial_state or return_state: "
        "a state is the sum of one row."
      )
  if key_mask is not None:
    # Hidden keys may hold NaN, and 0 times NaN is NaN.
    is_visible = key_mask[:, :, None, None]
    key, value = jnp.where(is_visible, key, 0), jnp.where(is_visible, value, 0)
  batch, length, all_heads, _ = query.shape
  heads = key.shape[2]
  query = query.reshape(batch, length, heads, all_heads // heads, -1)
  return Inputs(query, key, value, key_mask, segment_ids)


def start(
  maps: Maps,
  constants: PyTree,
  key: Array | jax.ShapeDtypeStruct,
  value_dim: int,
  is_signed: bool,
) -> State:
  """Returns the state before any key, of the size that the maps need."""
  batch, _, heads, head_dim = key.shape
  token = jax.ShapeDtypeStruct((batch, heads, 1, head_dim), jnp.float32)
  features = jax.eval_shape(maps.key, constants, token, 0)
  log_magnitude = features.log_magnitude
  return empty_state(
    batch,
    heads,
    # A log-magnitude that all features share has size 1, the factor has F.
    max(leaf.shape[-1] for leaf in jax.tree.leaves(features)),
    value_dim,
    exponent_dim=1 if log_magnitude is None else log_magnitude.shape[-1],
    is_signed=is_signed,
  )


def check_sums(state: State, expected: State) -> None:
  """Raises ValueError unless the state has the expected kind and sizes."""
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
