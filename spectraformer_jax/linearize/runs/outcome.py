"""Everything that a conversion has found, for its files."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from spectraformer_jax.feature_maps.feature_map import FeatureMap
from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.linearize.certificate import certify
from spectraformer_jax.linearize.records import Certificate, FittedLayer
from spectraformer_jax.linearize.runs.judge import Verdict
from spectraformer_jax.linearize.runs.source import Source
from spectraformer_jax.linearize.runs.speed import Speed
from spectraformer_jax.study.approximation.inputs import Inputs
from spectraformer_jax.study.approximation.pair_spec import Pair
from spectraformer_jax.train.run.run_folder import write_text
from spectraformer_jax.typing import Array, FeatureVariables

# Maps that are put in without a fit, to compare with.
LANDMARK_FEATURES = 128
LANDMARKS = (Pair("oprf", "orf"), Pair("asderf", "orf"))
# Per-sequence statistics would see the future.
CAUSAL_LANDMARKS = tuple(
  Pair(f"{pair.component}(statistics=constant)", pair.matrix)
  for pair in LANDMARKS
)
TEACHER, CONVERSION = "teacher", "conversion"
FITTED, START = "fitted", "start"


class LayerFigures(NamedTuple):
  """What was found for one layer.

  Attributes:
    layer: the fitted map.
    certificate: of the fitted map, and of the map before the fit.
    landmarks: certificates of maps that were not fitted, by pair.
  """

  layer: FittedLayer
  certificate: Certificate
  landmarks: dict[str, Certificate]

  @property
  def by_map(self) -> dict[str, Certificate]:
    """All certificates: of the fitted map, of its start, of landmarks."""
    start = self.certificate.start
    own = {FITTED: self.certificate}
    if start is not None:
      own[START] = start
    return own | self.landmarks

  @property
  def why_start(self) -> str | None:
    """Why the map is kept as it was before the fit; None if it is not."""
    report = self.layer.report
    if not len(report.losses) or report.best_step:
      return None
    if report.held_out.min() >= report.uniform:
      return (
        f"its held-out loss stays above that of uniform attention, "
        f"{report.uniform:.3g}"
      )
    return f"no step improves on its held-out loss, {report.start_loss:.3g}"


class Outcome(NamedTuple):
  """The results of one command.

  Attributes:
    source: what was converted.
    pair: of the feature map.
    feature_map: which was fitted.
    exact: keys that attention sees exactly.
    steps: that were asked for.
    layers: in the order of the model.
    speeds: at the captured length, and at longer ones.
    verdicts: on the dev split, by model; empty without a model.
    test_accuracy: of teacher and conversion; empty without a model.
  """

  source: Source
  pair: Pair
  feature_map: FeatureMap
  exact: ExactKeys
  steps: int
  layers: list[LayerFigures]
  speeds: list[Speed]
  verdicts: Mapping[str, Verdict]
  test_accuracy: Mapping[str, float]


def landmark_maps(is_causal: bool) -> dict[str, FeatureMap]:
  """Returns the maps to compare with, by pair."""
  pairs = CAUSAL_LANDMARKS if is_causal else LANDMARKS
  return {pair.name: pair.build(LANDMARK_FEATURES) for pair in pairs}


def draw_landmark(
  feature_map: FeatureMap, inputs: Sequence[Inputs], rng: Array
) -> dict[str, FeatureVariables]:
  """Draws variables of a map that is not fitted, for each layer by name.

  Args:
    feature_map: the map.
    inputs: of each layer.
    rng: PRNG key.
  """
  return {
    layer.name: feature_map.init(
      jax.random.fold_in(rng, number),
      head_dim=layer.key.shape[3],
      num_heads=layer.key.shape[2],
    )
    for number, layer in enumerate(inputs)
  }


def certify_layer(
  source: Source,
  held_out: Inputs,
  exact: ExactKeys,
  feature_map: FeatureMap,
  variables: FeatureVariables,
  start: FeatureVariables | None = None,
) -> Certificate:
  """Measures a layer's map on its held-out sequences; see `certify`."""
  return certify(
    jnp.asarray(held_out.query),
    jnp.asarray(held_out.key),
    jnp.asarray(held_out.value),
    feature_map=feature_map,
    variables=variables,
    start=start,
    is_causal=source.is_causal,
    key_mask=jnp.asarray(held_out.key_mask),
    query_mask=jnp.asarray(held_out.query_mask),
    target=source.target,
    **exact._asdict(),
  )


COLUMNS = (
  "layer",
  "head",
  "map",
  "error",
  "uniform_error",
  "kl",
  "entropy",
  "score_std",
)


def write_results(path: Path, layers: Sequence[LayerFigures]) -> None:
  """Writes a row for each layer, map and head; "all" is all heads together."""
  rows: list[Sequence[str]] = [COLUMNS]
  for figures in layers:
    for name, found in figures.by_map.items():
      mean = lambda x: float(np.mean(x))
      heads = [
        ("all", found.error_all, found.uniform_error)
        + tuple(map(mean, (found.kl, found.entropy, found.score_std))),
        *(
          (str(head), *values)
          for head, values in enumerate(
            zip(
              found.error,
              found.uniform,
              found.kl,
              found.entropy,
              found.score_std,
              strict=True,
            )
          )
        ),
      ]
      for head, *values in heads:
        cells = [f"{value:.6g}" for value in values]
        rows.append([figures.layer.name, head, name, *cells])
  text = io.StringIO()
  csv.writer(text, lineterminator="\n").writerows(rows)
  write_text(path, text.getvalue())
