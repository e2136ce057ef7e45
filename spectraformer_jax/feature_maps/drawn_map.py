"""A component and a weight matrix, and the variables they draw."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from spectraformer_jax.components import Component
from spectraformer_jax.feature_maps.prepared import (
  cast_floats,
  cast_like,
  check_redrawable,
  check_sizes,
  drop_empty,
  store,
)
from spectraformer_jax.typing import Array, FeatureVariables, WeightSample
from spectraformer_jax.weight_matrices import WeightMatrix, get_row_law


@dataclasses.dataclass(frozen=True)
class DrawnMap:
  """What a feature map draws and learns.

  Attributes:
    component: f.
    weight_matrix: W.
    num_features: M; None for a component without rows.
  """

  component: Component
  weight_matrix: WeightMatrix
  num_features: int | None

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
      dtype: of the stored projection, but for log-weights and integers
        (permutations, bits), which are float32; drawn in float32, then cast.

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
    check_sizes(self, head_dim, num_heads)

    def one_head(rng):
      component_rng, matrix_rng = jax.random.split(rng)
      return drop_empty(
        component=self.component.init(component_rng, head_dim),
        rows=self._init_rows(matrix_rng, head_dim),
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
  ):
    """The `projection` of `init` alone."""
    check_sizes(self, head_dim, num_heads)
    law = get_row_law(self.component.info.row_law)

    def one_head(rng):
      component_rng, matrix_rng = jax.random.split(rng)
      return drop_empty(
        component=self.component.draw(
          component_rng, self.num_features, head_dim
        ),
        rows=self._draw_rows(matrix_rng, head_dim, law),
      )

    drawn = jax.vmap(one_head)(jax.random.split(rng, num_heads))
    return store(drawn, dtype)

  def redraw(self, rng: Array, variables: FeatureVariables) -> FeatureVariables:
    """New projection of the same shapes, same params. Works inside jit.

    Raises:
      ValueError: the weight matrix cannot be redrawn.
    """
    check_redrawable(self.weight_matrix)
    leaves = jax.tree.leaves(variables.projection)
    if not leaves:
      return variables
    head_dim = variables.projection["rows"]["w"].shape[-1]
    projection = self.init_projection(
      rng, head_dim=head_dim, num_heads=leaves[0].shape[0]
    )
    return variables._replace(projection=cast_like(projection, variables))

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
    return cast_floats(rows, jnp.float32)
