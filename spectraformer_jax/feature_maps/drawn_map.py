"""A component and a weight matrix, and the variables they draw."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax.checks import check_positive_int
from spectraformer_jax.components import Component
from spectraformer_jax.feature_maps.prepared import (
  cast_floats,
  drop_empty,
  store,
)
from spectraformer_jax.typing import (
  Array,
  FeatureVariables,
  Params,
  Projection,
  PyTree,
  WeightSample,
)
from spectraformer_jax.weight_matrices import WeightMatrix, get_row_law


@dataclasses.dataclass(frozen=True)
class DrawnMap:
  """The variables of a feature map: what it draws and learns.

  Attributes:
    component: f.
    weight_matrix: W.
    num_features: M; None for a component that takes none.
  """

  component: Component
  weight_matrix: WeightMatrix
  num_features: int | None

  @property
  def num_rows(self) -> int:
    """Rows of W; 0 for a component without rows."""
    if self.num_features is None or self.component.info.row_law == "none":
      return 0
    return self.component.num_rows(self.num_features)

  @functools.cached_property
  def has_params(self) -> bool:
    """Whether `init_params` makes any leaf; no size changes the answer."""
    return self.weight_matrix.info.learnable or bool(self.own_params(4))

  def own_params(self, head_dim: int) -> Params:
    """Returns shapes and dtypes of the component's parameters of one head."""
    return _own_params(self.component, head_dim, self.num_features or 0)

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
      dtype: of the stored projection, which is drawn in float32, then cast.
        Log-weights and integers (permutations, bits) are stored as float32.

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

  def init_params(
    self, rng: Array, *, head_dim: int, num_heads: int = 1
  ) -> Params:
    """Returns the `params` of `init`."""
    self._check_sizes(head_dim, num_heads)
    init = self.weight_matrix.init

    def one_head(rng: Array) -> Params:
      component_rng, matrix_rng = jax.random.split(rng)
      return drop_empty(
        component=self.component.init(
          component_rng, head_dim, self.num_features or 0
        ),
        rows=self._for_each_draw(
          lambda rng: init(rng, self._rows_per_draw, head_dim), matrix_rng
        ),
      )

    params = jax.vmap(one_head)(jax.random.split(rng, num_heads))
    return cast_floats(params, jnp.float32)

  def init_projection(
    self,
    rng: Array,
    *,
    head_dim: int,
    num_heads: int = 1,
    dtype: Any = jnp.float32,
  ) -> Projection:
    """Returns the `projection` of `init`."""
    self._check_sizes(head_dim, num_heads)
    law = get_row_law(self.component.info.row_law)
    draw = self.weight_matrix.draw

    def one_head(rng: Array) -> Projection:
      component_rng, matrix_rng = jax.random.split(rng)
      rows = self._for_each_draw(
        lambda rng: draw(rng, self._rows_per_draw, head_dim, law), matrix_rng
      )
      return drop_empty(
        component=self.component.draw(
          component_rng, self.num_features or 0, head_dim
        ),
        rows=rows if self.component.row_draws == 1 else _merge_draws(rows),
      )

    projection = jax.vmap(one_head)(jax.random.split(rng, num_heads))
    return store(projection, dtype)

  def redraw(self, rng: Array, variables: FeatureVariables) -> FeatureVariables:
    """Draws a new projection of the same shapes and dtypes; keeps the params.

    Works inside jit.

    Raises:
      ValueError: the weight matrix cannot be redrawn.
    """
    info = self.weight_matrix.info
    if not info.redrawable:
      raise ValueError(
        f"weight matrix {info.name!r} cannot be redrawn: its rows are fixed "
        "once it is initialised."
      )
    leaves = jax.tree.leaves(variables.projection)
    if not leaves:
      return variables
    head_dim = variables.projection["rows"]["w"].shape[-1]
    drawn = self.init_projection(
      rng, head_dim=head_dim, num_heads=leaves[0].shape[0]
    )
    cast = lambda new, old: new.astype(old.dtype)
    return variables._replace(
      projection=jax.tree.map(cast, drawn, variables.projection)
    )

  def _check_sizes(self, head_dim: int, num_heads: int) -> None:
    """Raises ValueError for sizes that this pair cannot make."""
    check_positive_int("head_dim", head_dim)
    check_positive_int("num_heads", num_heads)
    self.component.check(self.num_features or 0, head_dim)
    self.weight_matrix.check(self._rows_per_draw, head_dim)

  @property
  def _rows_per_draw(self) -> int:
    """Rows of W in each of its independent draws."""
    return self.num_rows // self.component.row_draws

  def _for_each_draw(
    self, function: Callable[[Array], PyTree], rng: Array
  ) -> PyTree:
    """Calls `function` for one draw of W, or stacks its results for several."""
    draws = self.component.row_draws
    if draws == 1:
      return function(rng)
    return jax.vmap(function)(jax.random.split(rng, draws))

  def _rows(
    self, params: Params, projection: Projection, context: PyTree = ()
  ) -> WeightSample:
    """Makes the float32 rows of one head; the projection takes no gradient."""
    params = params.get("rows", {})
    projection = jax.lax.stop_gradient(projection.get("rows", {}))

    def make(params: Params, projection: Projection) -> WeightSample:
      return self.weight_matrix.rows(params, projection, context)

    draws = self.component.row_draws
    if draws == 1:
      rows = make(params, projection)
    else:
      split = lambda leaf: jnp.reshape(leaf, (draws, -1, *leaf.shape[1:]))
      rows = jax.vmap(make)(params, jax.tree.map(split, projection))
      rows = _merge_draws(rows)
    return cast_floats(rows, jnp.float32)


@functools.cache
def _own_params(
  component: Component, head_dim: int, num_features: int
) -> Params:
  """Returns what `Component.init` makes, without making it."""
  return jax.eval_shape(
    lambda rng: component.init(rng, head_dim, num_features), jax.random.key(0)
  )


def _merge_draws(tree: PyTree) -> PyTree:
  """Reshapes leaves ``[draws, M, ...] -> [draws M, ...]``."""
  return jax.tree.map(
    lambda leaf: jnp.reshape(leaf, (-1, *leaf.shape[2:])), tree
  )
