"""Feature maps: any component function on any weight matrix, phi = f o W."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float

from spectraformer_jax.checks import static_position
from spectraformer_jax.feature_maps.drawn_map import DrawnMap
from spectraformer_jax.feature_maps.prepared import (
  FeatureMapInfo,
  Prepared,
  check_stats,
  component_state,
  drop_empty,
  mean_over_examples,
  weigh_rows,
)
from spectraformer_jax.feature_maps.vmap_heads import (
  lead_with_batch,
  over_examples_and_heads,
)
from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  LogFeatures,
  Mask,
  PyTree,
  Side,
)

SIDES = ("query", "key")


@dataclasses.dataclass(frozen=True)
class FeatureMap(DrawnMap):
  """phi(x) = f(W x, x): pure functions over explicit variables.

  Make it with `feature_map` or `compose`. They return the same object for equal
  arguments, and it is hashable, so a jitted function that takes it as a static
  argument is not compiled again. Inputs x are already scaled: attention
  multiplies queries and keys by ``H**-0.25``, and no method here does.
  """

  @property
  def info(self) -> FeatureMapInfo:
    """Static facts about the pair of component and weight matrix."""
    f, w = self.component, self.weight_matrix
    return FeatureMapInfo(
      name=f"{f.info.name}-{w.info.name}",
      positive=f.info.positive and not w.info.signed,
      unbiased=w.info.marginals != "approximate" and not f.info.learnable,
      learnable=w.info.learnable or f.info.learnable,
      needs_stats=f.needs_stats or w.needs_stats,
    )

  @property
  def feature_dim(self) -> int | None:
    """Number of features F; None for the few maps where head_dim sets it."""
    return self.component.feature_dim(self.num_features or 0, None)

  def calibrate(
    self,
    variables: FeatureVariables,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    *,
    key_mask: Bool[Array, "B S"] | None = None,
    query_mask: Bool[Array, "B T"] | None = None,
  ) -> PyTree:
    """Computes stats: the data-dependent parameters of each example.

    They follow from the moments of the data in closed form.

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
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    *,
    key_mask: Bool[Array, "B S"] | None = None,
    query_mask: Bool[Array, "B T"] | None = None,
  ) -> PyTree:
    """Computes the averages that `solve` turns into stats: ``[B, N, ...]``.

    Arguments as in `calibrate`. Moments are means over positions and products
    of such means, so they may be averaged over examples, devices and time
    before `solve`. `mean_moments` averages over examples.
    """

    def one_head(
      variables: FeatureVariables,
      query: Array,
      key: Array,
      query_mask: Mask,
      key_mask: Mask,
    ) -> PyTree:
      of_component = ()
      if self.component.needs_stats:
        of_component = self.component.moments(query, key, query_mask, key_mask)
      params = variables.params.get("rows", {})
      of_rows = self.weight_matrix.calibrate(params, key, key_mask)
      return drop_empty(component=of_component, rows=of_rows)

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
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    *,
    key_mask: Bool[Array, "B S"] | None = None,
    query_mask: Bool[Array, "B T"] | None = None,
  ) -> tuple[PyTree, Array]:
    """Averages `moments` over the examples that have visible tokens.

    Arguments as in `calibrate`. An example whose queries or keys are all masked
    is left out of the average.

    Returns:
      The averages, leaves ``[1, N, ...]``, and a bool scalar: whether any
      example has visible tokens. Zeros and False if none has.

    Example:
      >>> import spectraformer_jax as sf
      >>> fm = sf.feature_map("oprf", "orf", num_features=16)
      >>> v = fm.init(jax.random.key(0), head_dim=4)
      >>> x = jnp.ones((2, 3, 1, 4)) / 2
      >>> mask = jnp.array([[True] * 3, [False] * 3])
      >>> mean, has_tokens = fm.mean_moments(v, x, x, key_mask=mask)
      >>> mean["component"]["key_square"].tolist(), bool(has_tokens)
      ([[1.0]], True)
    """
    masks = {"key_mask": key_mask, "query_mask": query_mask}
    moments = self.moments(variables, query, key, **masks)
    is_counted = jnp.ones(query.shape[:1], bool)
    for mask in masks.values():
      if mask is not None:
        is_counted &= jnp.any(mask, axis=1)
    return mean_over_examples(moments, is_counted), jnp.any(is_counted)

  def solve(self, moments: PyTree) -> PyTree:
    """Returns the stats for data with these moments, leaves ``[B, N, ...]``.

    Raises:
      ValueError: moments that this map needs are missing, as in checkpoints of
        earlier versions.
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
    x: Float[Array, "*batch T N H"],
    *,
    side: Side,
    stats: PyTree = None,
    position: Array | int = 0,
  ) -> LogFeatures:
    """Computes features as ``factor * exp(log_magnitude)``, both float32.

    Args:
      variables: from `init`.
      x: ``[..., T, N, H]``, scaled, any float dtype.
      side: "query" or "key".
      stats: from `calibrate`; leading axes ``[B, N]``, either may be 1.
      position: position of x's first token in its sequence; only maps with
        ``component.info.positional`` depend on it.

    Returns:
      `LogFeatures`: log_magnitude ``[..., T, N, F]`` or ``[..., T, N, 1]``,
      factor ``[..., T, N, F]`` or None.

    Raises:
      ValueError: unknown side, shapes that do not agree, missing stats, or a
        position beyond the component's longest sequence (a traced position is
        not checked).
    """
    check_choice("side", side, SIDES)
    self.check_inputs(variables, x)
    self.component.check_length(static_position(position) + x.shape[-3])
    flat = jnp.reshape(x, (-1, *x.shape[-3:]))
    check_stats(stats, flat)
    heads_first = jnp.swapaxes(flat, 1, 2).astype(jnp.float32)
    out = self.prepared_features(
      self.prepare(variables, stats), heads_first, side=side, position=position
    )
    unflatten = lambda leaf: jnp.swapaxes(leaf, 1, 2).reshape(
      *x.shape[:-1], leaf.shape[-1]
    )
    return jax.tree.map(unflatten, out)

  def prepare(
    self, variables: FeatureVariables, stats: PyTree = None
  ) -> Prepared:
    """Computes everything that the features of all tokens share.

    Args:
      variables: from `init`.
      stats: from `calibrate`; leading axes ``[B, N]``, either may be 1.

    Returns:
      `Prepared`; every leaf leads with ``[B or 1, N or 1]``. Gradients flow
      through it to the learnable parameters.

    Raises:
      ValueError: the component or the weight matrix needs stats, and they are
        missing.
    """
    self._check_has_stats(stats)

    def one_head(variables: FeatureVariables, stats: PyTree) -> Prepared:
      state = component_state(variables, stats)
      rows = self._rows(*variables, stats.get("rows", ()))
      state = self.component.prepare(state, rows.w.shape[-1])
      rows = self.component.realise_rows(rows, self.num_features or 0, state)
      return Prepared(rows, state)

    return over_examples_and_heads(one_head)(
      lead_with_batch(variables), stats or {}
    )

  def prepared_features(
    self,
    prepared: Prepared,
    x: Float[Array, "B N T H"],
    *,
    side: Side,
    position: Array | int | None = None,
    for_attention: bool = False,
  ) -> LogFeatures:
    """Computes features of x ``[B, N, T, H]`` float32: ``[B, N, T, F]``.

    Args:
      prepared: from `prepare`.
      x: scaled.
      side: "query" or "key".
      position: of x's first token; None: the position in `prepared`.
      for_attention: whether queries may lack a factor that all features of a
        token share, see `Component.query_features`.
    """

    def one_head(prepared: Prepared, x: Array) -> LogFeatures:
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
    x: Float[Array, "*batch T N H"],
    *,
    side: Side,
    stats: PyTree = None,
  ) -> Float[Array, "*batch T N F"]:
    """Computes the features themselves, for analysis: they may overflow.

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
    x: Float[Array, "... H"],
    y: Float[Array, "... H"],
    *,
    stats: PyTree = None,
  ) -> Float[Array, "..."]:
    """Computes the exact kernel that the map estimates.

    Args:
      variables: from `init`; the kernel of a component without learnable
        parameters does not depend on them, nor on the head.
      x: ``[..., H]``, scaled.
      y: ``[..., H]``, scaled; broadcast against x.
      stats: from `calibrate`.

    Returns:
      ``[...]``.

    Raises:
      ValueError: the weight matrix or the component is learnable: no fixed
        kernel exists.
    """
    if self.weight_matrix.info.learnable:
      raise ValueError(
        f"weight matrix {self.weight_matrix.info.name!r} is learnt, so "
        f"{self.info.name!r} has no fixed kernel to compare with."
      )
    first_head = jax.tree.map(lambda leaf: leaf[0], variables)
    state = component_state(first_head, stats)
    return self.component.kernel_value(x, y, state)

  def check_inputs(self, variables: FeatureVariables, x: Array) -> None:
    """Raises ValueError unless x ``[..., T, N, H]`` fits the variables."""
    if x.ndim < 3:
      raise ValueError(
        "x must be [..., length, heads, head_dim], got "
        f"x.shape={x.shape}; reshape to add the missing axes."
      )
    for leaf in jax.tree.leaves(variables):
      if leaf.shape[0] not in (1, x.shape[-2]):
        raise ValueError(
          f"variables hold {leaf.shape[0]} heads but x.shape={x.shape} has "
          f"{x.shape[-2]}: init with num_heads={x.shape[-2]}, or 1 to share."
        )
    if not self.num_rows:
      self._check_own_params(variables, x.shape[-1])
      return
    # Only shapes, so that nothing is read from a device.
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
    head_dim = rows.w.shape[-1]
    if head_dim != x.shape[-1]:
      raise ValueError(
        f"variables were made for head_dim={head_dim} but x.shape={x.shape} "
        f"has {x.shape[-1]}."
      )

  def _check_own_params(
    self, variables: FeatureVariables, head_dim: int
  ) -> None:
    """Raises ValueError unless the component's parameters are of this size."""
    shapes = lambda tree, skip: {
      jax.tree_util.keystr(path): leaf.shape[skip:]
      for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    got = shapes(variables.params.get("component", {}), 1)
    expected = shapes(self.own_params(head_dim), 0)
    if got != expected:
      raise ValueError(
        f"variables do not fit {self.info.name!r} with head_dim={head_dim} and "
        f"num_features={self.num_features}: make them by feature_map.init. "
        f"Their shapes are {got}, not {expected}."
      )

  def _check_has_stats(self, stats: PyTree) -> None:
    """Raises ValueError if stats that this map needs are missing."""
    component, matrix = self.component, self.weight_matrix
    if component.needs_stats and not stats:
      raise ValueError(
        f"component {component.info.name!r} with statistics="
        f"{getattr(component, 'statistics', None)!r} needs stats: pass "
        "stats=fm.calibrate(variables, query, key), or build it with "
        "statistics='constant' or 'learned'."
      )
    if matrix.needs_stats and "rows" not in (stats or {}):
      raise ValueError(
        f"weight matrix {matrix.info.name!r} needs the context of "
        "a sequence: pass stats=fm.calibrate(variables, query, key), or build "
        "it with context='learned'."
      )
