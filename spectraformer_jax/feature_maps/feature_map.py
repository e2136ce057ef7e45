"""Feature maps: any component function on any weight matrix, phi = f o W."""

import dataclasses

import jax
import jax.numpy as jnp

from spectraformer_jax.checks import known
from spectraformer_jax.components import ComponentState
from spectraformer_jax.feature_maps.drawn_map import DrawnMap
from spectraformer_jax.feature_maps.prepared import (
  FeatureMapInfo,
  Prepared,
  check_has_stats,
  check_head_dim,
  check_stats,
  check_x,
  drop_empty,
  mean_over_examples,
  weigh_rows,
)
from spectraformer_jax.feature_maps.vmap_heads import (
  lead_with_batch,
  over_examples_and_heads,
)
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  LogFeatures,
  PyTree,
  Side,
)

SIDES = ("query", "key")


@dataclasses.dataclass(frozen=True)
class FeatureMap(DrawnMap):
  """phi(x) = f(W x, x): pure functions over explicit variables.

  Hashable; make it with `feature_map` or `compose`, which return the same
  object for equal arguments, so that passing one as a static argument of a
  jitted function never recompiles. Inputs x are already scaled: attention
  multiplies queries and keys by ``H**-1/4`` once, nothing here does.
  """

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
    masks = {"key_mask": key_mask, "query_mask": query_mask}
    return self.solve(self.moments(variables, query, key, **masks))

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

    Arguments as in `calibrate`. They are means over positions and products of
    such means, so they may be averaged over examples, devices and time before
    `solve`. `mean_moments` averages over examples.
    """

    def one_head(variables, query, key, query_mask, key_mask):
      return drop_empty(
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

  def mean_moments(
    self,
    variables: FeatureVariables,
    query: Array,
    key: Array,
    *,
    key_mask: Array | None = None,
    query_mask: Array | None = None,
  ) -> tuple[PyTree, Array]:
    """`moments`, averaged over the examples that have visible tokens.

    Arguments as in `calibrate`. An example whose queries or keys are all hidden
    does not count, neither as zeros.

    Returns:
      The averages, leaves ``[1, N, ...]``, and whether any example counts, a
      bool scalar; zeros and False if none does.

    Example:
      >>> import spectraformer_jax as sf
      >>> fm = sf.feature_map("oprf", "orf", num_features=16)
      >>> v = fm.init(jax.random.key(0), head_dim=4)
      >>> x = jnp.ones((2, 3, 1, 4)) / 2
      >>> mask = jnp.array([[True] * 3, [False] * 3])
      >>> mean, counts = fm.mean_moments(v, x, x, key_mask=mask)
      >>> mean["component"]["key_square"].tolist(), bool(counts)
      ([[1.0]], True)
    """
    masks = {"key_mask": key_mask, "query_mask": query_mask}
    moments = self.moments(variables, query, key, **masks)
    counts = jnp.ones(query.shape[:1], bool)
    for mask in masks.values():
      if mask is not None:
        counts &= jnp.any(mask, axis=1)
    return mean_over_examples(moments, counts), jnp.any(counts)

  def solve(self, moments: PyTree) -> PyTree:
    """Stats for data with these moments, leaves ``[B, N, ...]``.

    Raises:
      ValueError: moments that lack what this map needs, as those that earlier
        versions kept do.
    """
    if not moments:
      return ()
    stats = dict(moments)
    if "component" in moments:
      solve = over_examples_and_heads(self.component.solve)
      try:
        stats["component"] = solve(moments["component"])
      except KeyError as error:
        raise ValueError(
          f"moments for {self.info.name!r} lack {error}: running statistics "
          "of an earlier version cannot be used; drop the collection "
          "'feature_stats' and train on, or take new ones with fm.moments."
        ) from error
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
      ValueError: unknown side, shapes that do not agree, missing stats, or
        positions that are known to be beyond what the component can map.
    """
    if side not in SIDES:
      raise ValueError(f"side must be one of {SIDES}, got {side!r}.")
    self.check_inputs(variables, x)
    self.component.check_length(known(position) + x.shape[-3])
    flat = jnp.reshape(x, (-1, *x.shape[-3:]))
    check_stats(stats, flat)
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
    check_has_stats(self, stats)

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
    for_attention: bool = False,
  ) -> LogFeatures:
    """`log_features` of x ``[B, N, T, H]`` float32 -> ``[B, N, T, F]``.

    Without `position` the prepared state's holds. `for_attention` takes
    `Component.query_features`.
    """

    def one_head(prepared, x):
      rows, state = prepared
      if position is not None:
        state = state._replace(position=position)
      if for_attention and side == "query":
        out = self.component.query_features(x, rows, state)
      else:
        out = self.component.log_features(x, rows, side, state)
      return weigh_rows(out, rows, side, self.num_features)

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
      >>> import spectraformer_jax as sf
      >>> fm = sf.feature_map("trigrf", "orf", num_features=64)
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

  def check_inputs(self, variables: FeatureVariables, x: Array) -> None:
    """ValueError unless x fits the variables, and its length the component."""
    check_x(self.component, variables, x)
    if not self.num_rows:
      return
    # Shapes alone: nothing is read from a device.
    one_head = jax.tree.map(
      lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), variables
    )
    try:
      rows = jax.eval_shape(self._rows, *one_head)
    except (KeyError, AttributeError):
      raise ValueError(
        f"variables are not those of {self.info.name!r}: make them by "
        "feature_map.init."
      ) from None
    check_head_dim(rows.w.shape[-1], x)
