"""The public call, and what it shares with `spectral_attention`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, overload

import jax
import jax.numpy as jnp

from spectraformer_jax import checks, meshes
from spectraformer_jax.linear_attention import (
  bidirectional,
  causal,
  chunks,
  pallas,
  reference,
  segments,
)
from spectraformer_jax.linear_attention.empty import attend_empty
from spectraformer_jax.linear_attention.products import PLAIN
from spectraformer_jax.linear_attention.state import (
  Maps,
  State,
  empty_state,
  joined,
  parted,
  with_rest,
)
from spectraformer_jax.registry import nearest
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
  run = _first_that_runs(
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


def _first_that_runs(names, *args, **kwargs) -> Callable:
  """The first implementation that can run, with its arguments.

  Raises:
    ValueError: none can; the message gives the reason of each.
  """
  reasons = []
  for name in names:
    implementation = IMPLEMENTATIONS[name]
    reason = implementation.refuses(*args, **kwargs)
    if reason is None:
      return functools.partial(implementation.run, *args, **kwargs)
    reasons.append(f"implementation {name!r} cannot run: {reason}")
  raise ValueError("; ".join(reasons) + ".")


def _xla(
  maps,
  constants,
  state,
  query,
  key,
  value,
  keep,
  segment_ids,
  *,
  is_causal,
  chunk,
):
  """The linear form in plain XLA."""
  if segment_ids is not None:
    out = segments.packed(
      maps,
      constants,
      state,
      query,
      key,
      value,
      keep,
      segment_ids,
      is_causal=is_causal,
      chunk=chunk,
    )
    return out, None
  if is_causal:
    return _causal(maps, chunk, constants, state, query, key, value, keep)
  return bidirectional.bidirectional(
    maps, constants, state, query, key, value, keep, chunk=chunk
  )


def _causal(maps, chunk, constants, state, query, key, value, keep):
  """The triangle from the top left, whatever T and S are."""
  length, num_keys = query.shape[1], key.shape[1]
  if length == num_keys:
    inputs = query, key, value, keep, None
    return causal.causal(maps, chunk, constants, state, *inputs)
  seen = min(length, num_keys)
  rest = [None if x is None else x[:, seen:] for x in (key, value, keep)]
  inputs = [None if x is None else x[:, :seen] for x in (key, value, keep)]
  if seen < length:
    # Queries from S on see all keys: those that follow are hidden.
    if keep is None:
      inputs[2] = jnp.ones(key.shape[:2], bool)
    inputs = [
      jnp.pad(x, [(0, 0), (0, length - seen)] + [(0, 0)] * (x.ndim - 2))
      for x in inputs
    ]
  out, after = causal.causal(
    maps, chunk, constants, state, query, *inputs, None
  )
  after = after._replace(length=state.length + seen)
  if seen < num_keys:
    after = bidirectional.accumulate(maps.key, chunk, constants, after, *rest)
  return out, after


def _reference(
  maps,
  constants,
  state,
  query,
  key,
  value,
  keep,
  segment_ids,
  *,
  is_causal,
  chunk,
):
  """The quadratic form: every feature and every weight exists."""
  del chunk
  value = value.astype(jnp.float32)
  visible = checks.visible_keys(query, key, is_causal, keep, segment_ids)
  in_groups = jax.vmap(maps.query, in_axes=(None, 2, None), out_axes=2)
  grouped = jnp.moveaxis(query, 1, 3)
  by_head = [jnp.swapaxes(x, 1, 2) for x in (key, value)]
  position = state.length
  # Queries that hold NaN give NaN, but no gradient of their own.
  is_bad = ~jnp.all(jnp.isfinite(grouped), axis=-1, keepdims=True)
  out = reference.attend(
    in_groups(
      constants, jnp.where(is_bad, 0, grouped), position if is_causal else 0
    ),
    maps.key(constants, by_head[0], position),
    by_head[1],
    visible[:, :, None],
    state=state,
    segments=segment_ids,
  )
  keep = None if keep is None else keep[:, None, :, None]
  after = chunks.add_keys(
    maps.key, constants, joined(state), *by_head, position, keep, PLAIN
  )
  after = parted(after)._replace(length=position + key.shape[1])
  out = jnp.where(is_bad, jnp.nan, out)
  return jnp.moveaxis(out, 3, 1), after


def _never_refuses(*args, **kwargs) -> None:
  """No reason not to run."""
  del args, kwargs


class Implementation(NamedTuple):
  """One way to attend.

  Attributes:
    run: maps and attends. Takes maps, constants, the state, query
      ``[B, T, N, G, H]``, key, value, key_mask, segment_ids (a pair or None),
      is_causal and chunk (None for a default); returns ``[B, T, N, G, V]`` and
      the state after.
    refuses: with the same arguments, says why it cannot run; None if it can.
  """

  run: Callable
  refuses: Callable[..., str | None] = _never_refuses


# In the order in which implementation=None tries them. Pallas comes after what
# always runs: it is for those who ask, until a measurement says otherwise.
IMPLEMENTATIONS: dict[str, Implementation] = {
  "xla": Implementation(_xla),
  "reference": Implementation(_reference),
} | {
  f"pallas_{platform}": Implementation(kernels.run, kernels.refuses)
  for platform, kernels in pallas.KERNELS.items()
}


def names_of(implementation: str | Sequence[str] | None) -> tuple[str, ...]:
  """The names asked for, in order; ValueError for an unknown one."""
  if implementation is None:
    return tuple(IMPLEMENTATIONS)
  names = (
    (implementation,)
    if isinstance(implementation, str)
    else tuple(implementation)
  )
  if not names:
    raise ValueError("implementation must name at least one, got ().")
  for name in names:
    if name not in IMPLEMENTATIONS:
      raise ValueError(
        f"Unknown implementation {name!r}.{nearest(name, IMPLEMENTATIONS)}"
      )
  return names
