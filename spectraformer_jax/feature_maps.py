"""Feature maps: any component function on any weight matrix, phi = f o W."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.components import (
  COMPONENTS,
  Component,
  ComponentState,
  build_component,
)
from spectraformer_jax.heads import lead_with_batch, over_examples_and_heads
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  LogFeatures,
  PyTree,
  Side,
  WeightSample,
)
from spectraformer_jax.weight_matrices import (
  WEIGHT_MATRICES,
  WeightMatrix,
  get_row_law,
)

SIDES = ("query", "key")


@dataclasses.dataclass(frozen=True)
class FeatureMapInfo:
  """Static facts about a pair.

  Attributes:
    name: "component-matrix".
    positive: features are never negative (component and row weights).
    unbiased: the estimate's mean is exactly the kernel (exact or weighted
      marginals); otherwise see the matrix's docstring for the bias.
    learnable: the weight matrix has trainable parameters, so there is no fixed
      kernel to compare with.
    needs_stats: features need data-dependent `stats`.
  """

  name: str
  positive: bool
  unbiased: bool
  learnable: bool
  needs_stats: bool


class Prepared(NamedTuple):
  """Rows and component state per example and head; see `FeatureMap.prepare`."""

  rows: WeightSample
  state: ComponentState


@dataclasses.dataclass(frozen=True)
class FeatureMap:
  """phi(x) = f(W x, x): pure functions over explicit variables.

  Hashable; make it with `feature_map` or `compose`, which return the same
  object for equal arguments, so that passing one as a static argument of a
  jitted function never recompiles. Inputs x are already scaled: attention
  multiplies queries and keys by ``H**-1/4`` once, nothing here does.
  """

  component: Component
  weight_matrix: WeightMatrix
  num_features: int | None

  @property
  def info(self) -> FeatureMapInfo:
    """Static facts about the pair."""
    f, w = self.component, self.weight_matrix
    return FeatureMapInfo(
      name=f"{f.info.name}-{w.info.name}",
      positive=f.info.positive and not w.info.signed,
      unbiased=w.info.marginals != "approximate",
      learnable=w.info.learnable,
      needs_stats=f.needs_stats or w.needs_stats,
    )

  @property
  def feature_dim(self) -> int | None:
    """F; None for the few maps where it depends on head_dim."""
    return self.component.feature_dim(self.num_features, None)

  @property
  def num_rows(self) -> int:
    """Rows of W; 0 for a component without."""
    if self.num_features is None:
      return 0
    return self.component.num_rows(self.num_features)

  def init(
    self,
    rng: Array,
    *,
    head_dim: int,
    num_heads: int = 1,
    dtype: Any = jnp.float32,
  ) -> FeatureVariables:
    """Draws the projection and makes the learnable parameters.

    Args:
      rng: PRNG key.
      head_dim: H.
      num_heads: N; 1 shares one W among all heads.
      dtype: of the stored projection; drawn in float32, then cast.

    Returns:
      `FeatureVariables`; every leaf has a leading head axis ``[num_heads]``.

    Raises:
      ValueError: sizes that are not positive, or that this pair cannot make.
    """
    params_rng, projection_rng = jax.random.split(rng)
    sizes = {"head_dim": head_dim, "num_heads": num_heads}
    return FeatureVariables(
      self.init_params(params_rng, **sizes),
      self.init_projection(projection_rng, **sizes, dtype=dtype),
    )

  def init_params(self, rng: Array, *, head_dim: int, num_heads: int = 1):
    """The `params` of `init` alone."""
    self._check_sizes(head_dim, num_heads)

    def one_head(rng):
      component_rng, matrix_rng = jax.random.split(rng)
      return _drop_empty(
        component=self.component.init(component_rng, head_dim),
        rows=self._init_rows(matrix_rng, head_dim),
      )

    return jax.vmap(one_head)(jax.random.split(rng, num_heads))

  def init_projection(
    self,
    rng: Array,
    *,
    head_dim: int,
    num_heads: int = 1,
    dtype: Any = jnp.float32,
  ):
    """The `projection` of `init` alone."""
    self._check_sizes(head_dim, num_heads)
    law = get_row_law(self.component.info.row_law)

    def one_head(rng):
      component_rng, matrix_rng = jax.random.split(rng)
      return _drop_empty(
        component=self.component.draw(
          component_rng, self.num_features, head_dim
        ),
        rows=self._draw_rows(matrix_rng, head_dim, law),
      )

    drawn = jax.vmap(one_head)(jax.random.split(rng, num_heads))
    return jax.tree.map(
      lambda leaf: leaf.astype(dtype) if _is_float(leaf) else leaf, drawn
    )

  def redraw(self, rng: Array, variables: FeatureVariables) -> FeatureVariables:
    """New projection of the same shapes, same params. Works inside jit.

    Raises:
      ValueError: the weight matrix cannot be redrawn.
    """
    if not self.weight_matrix.info.redrawable:
      raise ValueError(
        f"weight matrix {self.weight_matrix.info.name!r} cannot be redrawn: "
        "its rows are fixed once it is initialised."
      )
    leaves = jax.tree.leaves(variables.projection)
    if not leaves:
      return variables
    head_dim = variables.projection["rows"]["w"].shape[-1]
    floats = [leaf.dtype for leaf in leaves if _is_float(leaf)]
    dtype = floats[0] if floats else jnp.float32
    projection = self.init_projection(
      rng, head_dim=head_dim, num_heads=leaves[0].shape[0], dtype=dtype
    )
    return FeatureVariables(variables.params, projection)

  def calibrate(
    self,
    variables: FeatureVariables,
    query: Array,
    key: Array,
    *,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
  ) -> PyTree:
    """Data-dependent parameters in closed form, each example for itself.

    Args:
      variables: from `init`.
      query: ``[B, T, N, H]``, scaled.
      key: ``[B, S, N, H]``, scaled; S may differ from T.
      key_mask: ``[B, S]`` bool: keys that count.
      query_mask: ``[B, T]`` bool: queries that count.

    Returns:
      A pytree whose leaves have leading axes ``[B, N]``, without gradient;
      ``()`` for a map that needs none.
    """
    return self.solve(
      self.moments(
        variables, query, key, key_mask=key_mask, query_mask=query_mask
      )
    )

  def moments(
    self,
    variables: FeatureVariables,
    query: Array,
    key: Array,
    *,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
  ) -> PyTree:
    """The averages that `solve` turns into stats; leaves ``[B, N, ...]``.

    They are means over positions, so they may be averaged over examples,
    devices and time before `solve`: running statistics for causal attention.
    Arguments as in `calibrate`.
    """

    def one_head(variables, query, key, query_mask, key_mask):
      return _drop_empty(
        component=self.component.moments(query, key, query_mask, key_mask)
        if self.component.needs_stats
        else (),
        rows=self.weight_matrix.calibrate(
          variables.params.get("rows", {}), key, key_mask
        ),
      )

    query, key = (
      jnp.swapaxes(x, 1, 2).astype(jnp.float32) for x in (query, key)
    )
    masks = jax.tree.map(lambda mask: mask[:, None], (query_mask, key_mask))
    moments = over_examples_and_heads(one_head)(
      lead_with_batch(variables), query, key, *masks
    )
    return jax.tree.map(jax.lax.stop_gradient, moments) or ()

  def solve(self, moments: PyTree) -> PyTree:
    """Stats for data with these moments, leaves ``[B, N, ...]``."""
    if not moments:
      return ()
    stats = dict(moments)
    if "component" in moments:
      solve = over_examples_and_heads(self.component.solve)
      stats["component"] = solve(moments["component"])
    return jax.tree.map(jax.lax.stop_gradient, stats)

  def log_features(
    self,
    variables: FeatureVariables,
    x: Array,
    *,
    side: Side,
    stats: PyTree = None,
    position: Array | int = 0,
  ) -> LogFeatures:
    """Features as ``factor * exp(log_magnitude)``, both float32.

    Args:
      variables: from `init`.
      x: ``[..., T, N, H]``, scaled, any float dtype.
      side: "query" or "key".
      stats: from `calibrate`; leading axes ``[B, N]``, either may be 1.
      position: where in its sequence the first token of x stands; only maps
        with ``component.info.positional`` look at it.

    Returns:
      `LogFeatures`: log_magnitude ``[..., T, N, F]`` or ``[..., T, N, 1]``,
      factor ``[..., T, N, F]`` or None.

    Raises:
      ValueError: unknown side, shapes that do not agree, or missing stats.
    """
    if side not in SIDES:
      raise ValueError(f"side must be one of {SIDES}, got {side!r}.")
    self.check_inputs(variables, x)
    flat = jnp.reshape(x, (-1, *x.shape[-3:]))
    _check_stats(stats, flat)
    prepared = self.prepare(variables, stats)
    out = self.prepared_features(
      prepared,
      jnp.swapaxes(flat, 1, 2).astype(jnp.float32),
      side=side,
      position=position,
    )
    return jax.tree.map(
      lambda leaf: jnp.swapaxes(leaf, 1, 2).reshape(
        *x.shape[:-1], leaf.shape[-1]
      ),
      out,
    )

  def prepare(
    self, variables: FeatureVariables, stats: PyTree = None
  ) -> Prepared:
    """All that features of any number of tokens need, computed once.

    Args:
      variables: from `init`.
      stats: from `calibrate`; leading axes ``[B, N]``, either may be 1.

    Returns:
      `Prepared`; every leaf leads with ``[B or 1, N or 1]``. Gradients flow
      through it to the learnable parameters.

    Raises:
      ValueError: the component or the weight matrix needs stats that are not
        there.
    """
    if self.component.needs_stats and not stats:
      raise ValueError(
        f"component {self.component.info.name!r} with statistics="
        f"{self.component.statistics!r} needs stats: pass stats=fm.calibrate("
        "variables, query, key), or build it with statistics='constant' or "
        "'learned'."
      )
    if self.weight_matrix.needs_stats and "rows" not in (stats or {}):
      raise ValueError(
        f"weight matrix {self.weight_matrix.info.name!r} needs the context of "
        "a sequence: pass stats=fm.calibrate(variables, query, key), or build "
        "it with context='learned'."
      )

    def one_head(variables, stats):
      params, projection = variables
      state = ComponentState(
        params.get("component", {}),
        jax.lax.stop_gradient(projection.get("component", {})),
        stats.get("component", ()),
      )
      rows = self._rows(*variables, stats.get("rows", ()))
      state = self.component.prepare(state, rows.w.shape[-1])
      rows = self.component.realise_rows(rows, self.num_features, state)
      return Prepared(rows, state)

    return over_examples_and_heads(one_head)(
      lead_with_batch(variables), stats or {}
    )

  def prepared_features(
    self,
    prepared: Prepared,
    x: Array,
    *,
    side: Side,
    position: Array | int | None = None,
  ) -> LogFeatures:
    """`log_features` of x ``[B, N, T, H]`` float32 -> ``[B, N, T, F]``.

    Without `position` that of the prepared state holds.
    """

    def one_head(prepared, x):
      rows, state = prepared
      if position is not None:
        state = state._replace(position=position)
      out = self.component.log_features(x, rows, side, state)
      return _weigh_rows(out, rows, side, self.num_features)

    return over_examples_and_heads(one_head)(prepared, x)

  def apply(
    self,
    variables: FeatureVariables,
    x: Array,
    *,
    side: Side,
    stats: PyTree = None,
  ) -> Array:
    """The features themselves, unstabilised: for tests and analysis.

    ``E[apply(x, side="query") . apply(y, side="key")] = kernel(x, y)``.
    Arguments and errors as in `log_features`.

    Returns:
      ``[..., T, N, F]`` float32.

    Example:
      >>> fm = feature_map("trigrf", "orf", num_features=64)
      >>> v = fm.init(jax.random.key(0), head_dim=8)
      >>> x = jnp.full((1, 1, 8), 0.3)
      >>> phi = [fm.apply(v, x, side=side)[0, 0] for side in ("query", "key")]
      >>> bool(jnp.isclose(phi[0] @ phi[1], fm.kernel(v, x, x)[0, 0]))
      True
    """
    out = self.log_features(variables, x, side=side, stats=stats)
    magnitude = jnp.exp(out.log_magnitude)
    return magnitude if out.factor is None else out.factor * magnitude

  def kernel(
    self,
    variables: FeatureVariables,
    x: Array,
    y: Array,
    *,
    stats: PyTree = None,
  ) -> Array:
    """The exact kernel that the map estimates.

    Args:
      variables: from `init`; the kernel of a component without learnable
        parameters does not depend on them, nor on the head.
      x: ``[..., H]``, scaled.
      y: ``[..., H]``, scaled; broadcast against x.
      stats: from `calibrate`.

    Returns:
      ``[...]``.

    Raises:
      ValueError: the weight matrix is learnable: no fixed kernel exists.
    """
    if self.weight_matrix.info.learnable:
      raise ValueError(
        f"weight matrix {self.weight_matrix.info.name!r} is learnt, so "
        f"{self.info.name!r} has no fixed kernel to compare with."
      )
    params, random = (
      jax.tree.map(lambda leaf: leaf[0], tree.get("component", {}))
      for tree in variables
    )
    state = ComponentState(params, random, (stats or {}).get("component", ()))
    return self.component.kernel_value(x, y, state)

  def _init_rows(self, rng, head_dim):
    """Learnable leaves of the rows of one head, apart for each draw of W."""
    draws = self.component.row_draws
    num_rows = self.num_rows // draws
    init = lambda rng: self.weight_matrix.init(rng, num_rows, head_dim)
    if draws == 1:
      return init(rng)
    return jax.vmap(init)(jax.random.split(rng, draws))

  def _draw_rows(self, rng, head_dim, law):
    """Drawn leaves of the rows of one head."""
    draws = self.component.row_draws
    num_rows = self.num_rows // draws
    draw = lambda rng: self.weight_matrix.draw(rng, num_rows, head_dim, law)
    if draws == 1:
      return draw(rng)
    drawn = jax.vmap(draw)(jax.random.split(rng, draws))
    return jax.tree.map(
      lambda leaf: jnp.reshape(leaf, (-1, *leaf.shape[2:])), drawn
    )

  def _rows(self, params, projection, context=()) -> WeightSample:
    """Rows of one head, float32; the projection takes no gradient."""
    params = params.get("rows", {})
    projection = jax.lax.stop_gradient(projection.get("rows", {}))
    make = lambda *leaves: self.weight_matrix.rows(*leaves, context)
    draws = self.component.row_draws
    if draws == 1:
      rows = make(params, projection)
    else:
      projection = jax.tree.map(
        lambda leaf: jnp.reshape(leaf, (draws, -1, *leaf.shape[1:])), projection
      )
      rows = jax.tree.map(
        lambda leaf: jnp.reshape(leaf, (-1, *leaf.shape[2:])),
        jax.vmap(make)(params, projection),
      )
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), rows)

  def _check_sizes(self, head_dim: int, num_heads: int) -> None:
    """ValueError for sizes that this pair cannot make."""
    check_positive_int("head_dim", head_dim)
    check_positive_int("num_heads", num_heads)
    self.component.check(self.num_features, head_dim)
    num_rows = self.num_rows // self.component.row_draws
    self.weight_matrix.check(num_rows, head_dim)

  def check_inputs(self, variables: FeatureVariables, x: Array) -> None:
    """ValueError unless x fits the variables, and its length the component."""
    leaves = jax.tree.leaves(variables)
    if x.ndim < 3:
      raise ValueError(
        "x must be [..., length, heads, head_dim], got "
        f"x.shape={x.shape}; reshape to add the missing axes."
      )
    self.component.check_length(x.shape[-3])
    if not leaves or not self.num_rows:
      return
    heads = leaves[0].shape[0]
    if heads not in (1, x.shape[-2]):
      raise ValueError(
        f"variables hold {heads} heads but x.shape={x.shape} has "
        f"{x.shape[-2]}: init with num_heads={x.shape[-2]}, or 1 to share."
      )
    one_head = jax.tree.map(lambda leaf: leaf[0], variables)
    head_dim = jax.eval_shape(self._rows, *one_head).w.shape[-1]
    if head_dim != x.shape[-1]:
      raise ValueError(
        f"variables were made for head_dim={head_dim} but x.shape={x.shape} "
        f"has {x.shape[-1]}."
      )


def _weigh_rows(
  out: LogFeatures, rows: WeightSample, side: Side, num_features: int | None
) -> LogFeatures:
  """Adds 1/sqrt(M) and row weights; signs go to the query side alone."""
  if num_features is None:
    return out
  log_magnitude = out.log_magnitude - 0.5 * math.log(num_features)
  factor = out.factor
  if rows.log_weight is None and rows.sign is None:
    return LogFeatures(log_magnitude, factor)
  size = log_magnitude.shape[-1] if factor is None else factor.shape[-1]
  copies = size // rows.w.shape[0]
  if rows.log_weight is not None:
    log_magnitude += 0.5 * jnp.tile(rows.log_weight, copies)[None, :]
  if rows.sign is not None and side == "query":
    sign = jnp.tile(rows.sign, copies)[None, :]
    factor = jnp.broadcast_to(sign, (*log_magnitude.shape[:-1], size)) * (
      1.0 if factor is None else factor
    )
  return LogFeatures(log_magnitude, factor)


def _is_float(leaf: Array) -> bool:
  """Whether a leaf holds floats, not indices or bits."""
  return jnp.issubdtype(leaf.dtype, jnp.floating)


def _drop_empty(**parts) -> dict[str, PyTree]:
  """The parts that have leaves."""
  return {name: part for name, part in parts.items() if jax.tree.leaves(part)}


def _check_stats(stats, x):
  """ValueError unless leaves of stats lead with [B, N] of x, or ones."""
  batch, heads = x.shape[0], x.shape[2]
  for leaf in jax.tree.leaves(stats):
    if leaf.ndim < 2 or not (
      leaf.shape[0] in (1, batch) and leaf.shape[1] in (1, heads)
    ):
      raise ValueError(
        f"stats must lead with [batch, heads] = [{batch}, {heads}] (or ones), "
        f"got a leaf of shape {leaf.shape}."
      )


def feature_map(
  component: str,
  weight_matrix: str,
  *,
  num_features: int | None,
  component_kwargs: Mapping[str, Any] | None = None,
  weight_matrix_kwargs: Mapping[str, Any] | None = None,
) -> FeatureMap:
  """Builds a feature map by name.

  Args:
    component: a name of `list_components`.
    weight_matrix: a name of `list_weight_matrices`.
    num_features: M, per head; None for a component without rows (and weight
      matrix "none").
    component_kwargs: options of the component.
    weight_matrix_kwargs: options of the weight matrix.

  Returns:
    A `FeatureMap`; equal arguments give the same object.

  Raises:
    ValueError: unknown name or option (the message has the nearest known one),
      an option's bad value, or a pair that does not fit.

  Example:
    >>> fm = feature_map("oprf", "orf", num_features=128)
    >>> fm is feature_map("oprf", "orf", num_features=128)
    True
  """
  return compose(
    build_component(component, component_kwargs),
    WEIGHT_MATRICES.build(weight_matrix, weight_matrix_kwargs),
    num_features=num_features,
  )


def compose(
  component: Component,
  weight_matrix: WeightMatrix,
  *,
  num_features: int | None,
) -> FeatureMap:
  """Builds a feature map from objects: your own, or those of the package.

  Args:
    component: f.
    weight_matrix: W.
    num_features: M, per head; None for a component without rows (and weight
      matrix "none").

  Returns:
    A `FeatureMap`; equal arguments give the same object.

  Raises:
    ValueError: num_features is not a positive integer, or the pair does not
      fit (the message has the reason).

  Warns:
    UserWarning: once per pair, where the component weighs rows by their norms
      (OPRF and its kin) and the norms of the matrix are not Gaussian.

  Example:
    >>> from spectraformer_jax import components, weight_matrices
    >>> f = components.OPRF(statistics="constant")
    >>> compose(f, weight_matrices.ORF(), num_features=64).info.name
    'oprf-orf'
  """
  reason = mismatch(component, weight_matrix)
  if reason:
    raise ValueError(reason)
  if component.info.row_law != "none":
    check_positive_int("num_features", num_features)
  elif num_features is not None:
    raise ValueError(
      f"component {component.info.name!r} has no rows, so num_features must "
      f"be None, got {num_features!r}."
    )
  return _compose(component, weight_matrix, num_features)


@functools.cache
def _compose(component, weight_matrix, num_features) -> FeatureMap:
  """Same arguments, same object; what there is to warn of is said once."""
  warning = _norm_bias(component, weight_matrix)
  if warning:
    warnings.warn(warning, stacklevel=3)
  return FeatureMap(component, weight_matrix, num_features)


def _norm_bias(component: Component, weight_matrix: WeightMatrix) -> str | None:
  """What is wrong with this pair's row norms, in one line; None if nothing."""
  f, w = component.info, weight_matrix.info
  if not f.weighs_norms or w.learnable or w.marginals != "approximate":
    return None
  if getattr(weight_matrix, "norms", None) == "chi":
    return None  # directions alone are approximate
  return (
    f"{f.name}-{w.name} is biased: the component weighs rows by "
    f"exp(A|w|^2), and the row norms of weight matrix {w.name!r} are not those "
    "of Gaussian rows. The bias grows exponentially in head_dim A^2 and does "
    "not fall with num_features; matrices with exact marginals ('iid', 'orf', "
    "'mm_chi') have none, and 'posrf' has far less."
  )


def mismatch(component: Component, weight_matrix: WeightMatrix) -> str | None:
  """Why this pair cannot work, in one line; None if it can."""
  f, w = component.info, weight_matrix.info
  if f.row_law not in w.row_laws:
    return (
      f"component {f.name!r} needs rows of law {f.row_law!r}, weight matrix "
      f"{w.name!r} makes {', '.join(w.row_laws)}."
    )
  if w.trig_only and f.family != "trigonometric":
    return (
      f"weight matrix {w.name!r} has heavy tails: only trigonometric "
      f"components have finite variance with it, not {f.name!r}."
    )
  return None


def list_feature_maps() -> tuple[tuple[str, str], ...]:
  """Names (component, weight matrix) of all pairs that fit, sorted.

  With default options each; an option can widen or narrow what fits.

  Example:
    >>> pairs = list_feature_maps()
    >>> ("oprf", "orf") in pairs, ("oprf", "none") in pairs
    (True, False)
  """
  matrices = {n: WEIGHT_MATRICES.build(n) for n in WEIGHT_MATRICES.names()}
  return tuple(
    (name, matrix_name)
    for name in COMPONENTS.names()
    for matrix_name, matrix in matrices.items()
    if mismatch(COMPONENTS.build(name), matrix) is None
  )
