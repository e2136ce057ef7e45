"""Checks of components, weight matrices and feature maps."""

import dataclasses
import pickle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.components import (
  COMPONENTS,
  Component,
  ComponentInfo,
  TrigRF,
)
from spectraformer_jax.feature_maps.compose import compose, mismatch
from spectraformer_jax.feature_maps.feature_map import SIDES, FeatureMap
from spectraformer_jax.feature_maps.prepared import component_state
from spectraformer_jax.testing import contract
from spectraformer_jax.testing.contract import require
from spectraformer_jax.typing import Array, FeatureVariables
from spectraformer_jax.weight_matrices import (
  IID,
  ORF,
  WEIGHT_MATRICES,
  WeightMatrix,
  WeightMatrixInfo,
  get_row_law,
)

FAMILIES = (
  "trigonometric",
  "exponential",
  "dense exponential",
  "discrete",
  "hybrid",
  "own kernel",
  "learnt",
)
GROUPS = (
  "monte carlo",
  "geometric",
  "structural",
  "unit cube",
  "quadrature",
  "learner",
  "none",
)
MARGINALS = ("exact", "approximate", "weighted")

# (num_features, head_dim): num_features is smaller than head_dim, equal to it,
# and larger but not a multiple.
SIZES = ((3, 8), (8, 8), (11, 4))

# Pairs x, y at head_dim = 4: generic, opposite, and of mixed signs.
PAIRS = np.array(
  [
    [[0.3, -0.2, 0.5, 0.1], [0.4, 0.1, 0.3, -0.2]],
    [[0.4, 0.3, -0.2, 0.1], [-0.4, -0.3, 0.2, -0.1]],
    [[-0.6, 0.5, 0.2, -0.3], [0.5, 0.4, -0.4, 0.2]],
  ],
  np.float32,
)


def check_component(component: Component, *, num_draws: int = 1000) -> None:
  """Checks that a component keeps the contract of `components.Component`.

  Facts and docstring are complete, the object is hashable and picklable by its
  options, the map passes `check_feature_map`, row m determines features m,
  M + m, ... only, and the estimate is unbiased with independent and with
  orthogonal rows. Of a learnt component, all parameters have gradients instead.

  Args:
    component: what `sf.compose` takes.
    num_draws: number of independent draws for the test of the mean.

  Raises:
    AssertionError: a check fails; the message says which.

  Example:
    >>> from spectraformer_jax import components
    >>> check_component(components.PosRF())
  """
  require(
    isinstance(component, Component),
    f"{component!r} must subclass spectraformer_jax.components.Component.",
  )
  name = _check_info(component, ComponentInfo)
  require(
    component.info.family in FAMILIES,
    f"{name}: info.family must be one of {FAMILIES}, got "
    f"{component.info.family!r}.",
  )
  get_row_law(component.info.row_law)
  _check_object(component, name)
  matrices = [
    matrix
    for matrix in (IID(), ORF(), WEIGHT_MATRICES.build("none"))
    if mismatch(component, matrix) is None
  ]
  require(bool(matrices), f"{name}: no weight matrix makes its row law.")
  check_feature_map(_smallest(component, matrices[0]))
  contract.check_row_order(component, name)
  if component.info.learnable:
    contract.check_learner(_smallest(component, matrices[0]), name)
    return
  for matrix in matrices:
    check_unbiased(_smallest(component, matrix), num_draws=num_draws)


def check_weight_matrix(matrix: WeightMatrix, *, num_draws: int = 1000) -> None:
  """Checks that a weight matrix keeps the contract of `WeightMatrix`.

  Facts and docstring are complete, the object is hashable and picklable by its
  options, its row laws exist, a map with it passes `check_feature_map`, all
  parameters of a learner have gradients, and the estimate is unbiased if the
  matrix claims exact or weighted marginals.

  Args:
    matrix: what `sf.compose` takes.
    num_draws: number of independent draws for the test of the mean.

  Raises:
    AssertionError: a check fails; the message says which.

  Example:
    >>> from spectraformer_jax import weight_matrices
    >>> check_weight_matrix(weight_matrices.ORF())
  """
  require(
    isinstance(matrix, WeightMatrix),
    f"{matrix!r} must subclass spectraformer_jax.weight_matrices.WeightMatrix.",
  )
  name = _check_info(matrix, WeightMatrixInfo)
  for field, known in (("group", GROUPS), ("marginals", MARGINALS)):
    value = getattr(matrix.info, field)
    require(
      value in known, f"{name}: info.{field} must be in {known}, got {value!r}."
    )
  _check_object(matrix, name)
  for law in matrix.info.row_laws:
    get_row_law(law)
  # A positive map comes first: it depends on odd moments of W, so it shows
  # errors in them that a trigonometric map hides.
  trig_only = matrix.info.trig_only
  first = TrigRF("gaussian") if trig_only else COMPONENTS.build("posrf")
  components = [
    component
    for component in (first, *map(COMPONENTS.build, COMPONENTS.names()))
    if mismatch(component, matrix) is None
  ]
  require(bool(components), f"{name}: no component takes rows of its laws.")
  feature_map = _smallest(components[0], matrix)
  check_feature_map(feature_map)
  if matrix.info.learnable:
    contract.check_learner(feature_map, name)
  if matrix.info.marginals != "approximate":
    check_unbiased(feature_map, num_draws=num_draws)


def check_feature_map(feature_map: FeatureMap, *, head_dim: int = 4) -> None:
  """Checks one pair: shapes, keys, heads, gradients, redraw, caching.

  Args:
    feature_map: from `sf.compose` or `sf.feature_map`. The pair is also built
      at other sizes, which it may refuse by a ValueError that names the
      argument.
    head_dim: H of the numerical checks.

  Raises:
    AssertionError: a check fails; the message says which.

  Example:
    >>> import spectraformer_jax as sf
    >>> check_feature_map(sf.feature_map("posrf", "orf", num_features=6))
  """
  name = feature_map.info.name
  component, matrix = feature_map.component, feature_map.weight_matrix
  rebuilt = compose(component, matrix, num_features=feature_map.num_features)
  require(
    rebuilt is feature_map,
    f"{name}: equal arguments must build the same object; component and weight "
    "matrix need __eq__ and __hash__ by their options (frozen dataclasses).",
  )
  copied = pickle.loads(pickle.dumps(feature_map))
  require(copied == feature_map, f"{name}: pickling must keep it equal.")

  sizes = [(m, h) for m, h in SIZES if feature_map.num_features is not None]
  for num_features, size in [*sizes, (feature_map.num_features, head_dim)]:
    contract.check_shapes(
      compose(component, matrix, num_features=num_features),
      size,
      must_fit=size == head_dim and num_features == feature_map.num_features,
    )
  variables = contract.check_keys(feature_map, head_dim)
  x = jax.random.normal(jax.random.key(1), (3, 2, head_dim))
  stats = contract.self_stats(feature_map, variables, x)
  for check in (
    contract.check_features,
    contract.check_gradients,
    contract.check_query_features,
  ):
    check(feature_map, variables, x, stats)
  contract.check_redraw(feature_map, variables)


def check_unbiased(
  feature_map: FeatureMap, *, num_draws: int = 1000, max_score: float = 4.0
) -> None:
  """Checks that the mean of many draws is the kernel.

  Args:
    feature_map: from `sf.compose` or `sf.feature_map`.
    num_draws: number of independent draws.
    max_score: largest error of the mean, in standard errors.

  Raises:
    AssertionError: the error is larger, at one of three pairs of vectors.

  Example:
    >>> import spectraformer_jax as sf
    >>> check_unbiased(sf.feature_map("posrf", "orf", num_features=6))
  """
  scores = standard_scores(feature_map, num_draws=num_draws)
  require(
    bool(np.all(np.abs(scores) < max_score)),
    f"{feature_map.info.name}: the mean of {num_draws} estimates is "
    f"{np.round(scores, 1)} standard errors from the kernel at three pairs, "
    f"at most {max_score} is chance: kernel_value, or the features, are wrong.",
  )


def standard_scores(
  feature_map: FeatureMap, *, num_draws: int = 1000
) -> np.ndarray:
  """Returns the error of the mean estimate in standard errors, ``[3]``.

  One score for each of three pairs of vectors. A rounding error of 1e-5 of the
  kernel is allowed, so that a map without variance can pass. Arguments as in
  `check_unbiased`.

  Example:
    >>> import spectraformer_jax as sf
    >>> fm = sf.feature_map("trigrf", "iid", num_features=6)
    >>> standard_scores(fm, num_draws=100).shape
    (3,)
  """
  points = jnp.asarray(PAIRS[:, 0]), jnp.asarray(PAIRS[:, 1])
  # Sequences of length 1, so that positional maps see equal positions.
  x, y = (z[:, None, None, :] for z in points)

  # Drawing is compiled separately, because many maps share it.
  draw = lambda rng: feature_map.init(rng, head_dim=PAIRS.shape[-1])
  rngs = jax.random.split(jax.random.key(0), num_draws)
  draws = jax.jit(lambda rngs: jax.lax.map(draw, rngs))(rngs)
  first = jax.tree.map(lambda leaf: leaf[0], draws)
  stats = feature_map.calibrate(first, x, y)
  first_head = jax.tree.map(lambda leaf: leaf[0], first)
  state = component_state(first_head, None)
  kernel = feature_map.component.kernel_value(*points, state)

  def estimate(variables: FeatureVariables) -> Array:
    phi, psi = (
      feature_map.apply(variables, z, side=side, stats=stats)
      for z, side in zip((x, y), SIDES, strict=True)
    )
    return jnp.sum(phi * psi, axis=-1)[:, 0, 0]

  estimates = jax.jit(jax.vmap(estimate, axis_size=num_draws))(draws)
  samples = np.asarray(estimates, np.float64)
  error = samples.std(axis=0, ddof=1) / np.sqrt(num_draws)
  rounding = 1e-5 * np.abs(np.asarray(kernel)) + 1e-7
  return (samples.mean(axis=0) - np.asarray(kernel)) / np.hypot(error, rounding)


def smallest_num_features(
  component: Component,
  matrix: WeightMatrix,
  *,
  head_dim: int,
  at_least: int = 6,
) -> int | None:
  """Returns the smallest num_features that a pair accepts; None if it has none.

  Args:
    component: f.
    matrix: W.
    head_dim: H.
    at_least: the first number to try.

  Raises:
    AssertionError: the pair accepts no number up to 256.

  Example:
    >>> from spectraformer_jax import components, weight_matrices
    >>> smallest_num_features(
    ...   components.PosRF(), weight_matrices.MM(), head_dim=8
    ... )
    9
  """
  if not component.info.takes_num_features:
    return None
  reason = ""
  for num_features in range(at_least, 257):
    try:
      component.check(num_features, head_dim)
      matrix.check(component.num_rows(num_features), head_dim)
      return num_features
    except ValueError as error:
      reason = str(error)
  raise AssertionError(
    f"{component.info.name}-{matrix.info.name}: no num_features from "
    f"{at_least} to 256 is accepted at head_dim={head_dim}: {reason}"
  )


def _smallest(component: Component, matrix: WeightMatrix) -> FeatureMap:
  """Builds the pair for head_dim 4, with as few features as it accepts."""
  num_features = smallest_num_features(component, matrix, head_dim=4)
  return compose(component, matrix, num_features=num_features)


def _check_info(entry: Any, info_type: type) -> str:
  """Returns an entry's name; raises AssertionError if a fact is missing."""
  info: Any = getattr(entry, "info", None)
  kind = type(entry).__name__
  require(
    isinstance(info, info_type),
    f"{kind}.info must be a {info_type.__name__}, got {info!r}.",
  )
  for field in dataclasses.fields(info):
    require(
      field.name == "variance" or getattr(info, field.name) not in ("", ()),
      f"{kind}: info.{field.name} is empty; the docs' table shows it.",
    )
  return info.name


def _check_object(entry: Any, name: str) -> None:
  """Checks that an entry is frozen, hashable, copyable and documented."""
  params = getattr(type(entry), "__dataclass_params__", None)
  require(
    params is not None and params.frozen and params.eq,
    f"{name}: {type(entry).__name__} must be a frozen dataclass.",
  )
  for how, copied in (
    ("dataclasses.replace", dataclasses.replace(entry)),
    ("pickling", pickle.loads(pickle.dumps(entry))),
  ):
    require(
      copied == entry and hash(copied) == hash(entry),
      f"{name}: {how} must give an equal object with an equal hash.",
    )
  doc = type(entry).__doc__ or ""
  for part, why in (
    ("References:", "a References section (paper and equation)"),
    ("Example", "an Example section"),
    (">>> ", "an example that runs (a doctest)"),
  ):
    require(part in doc, f"{name}: the docstring lacks {why}.")
  inherited = " ".join(base.__doc__ or "" for base in type(entry).__mro__)
  for option in dataclasses.fields(entry):
    require(
      option.name in inherited,
      f"{name}: the docstring does not say what {option.name!r} does.",
    )
