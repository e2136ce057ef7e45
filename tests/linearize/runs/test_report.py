"""What a report says, of made-up results."""

import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.hybrid_attention.exact_keys import ExactKeys
from spectraformer_jax.linearize.records import (
  Certificate,
  FitReport,
  FittedLayer,
)
from spectraformer_jax.linearize.runs import report
from spectraformer_jax.linearize.runs.advice import advise
from spectraformer_jax.linearize.runs.judge import Verdict
from spectraformer_jax.linearize.runs.outcome import LayerFigures, Outcome
from spectraformer_jax.linearize.runs.source import Source
from spectraformer_jax.linearize.runs.speed import Speed
from spectraformer_jax.study.approximation.inputs import random_inputs
from spectraformer_jax.study.approximation.pair_spec import parse_pair
from spectraformer_jax.typing import FeatureVariables


def layer_figures(name, error, *, best_step=25, held_out=(1.0, 0.5)):
  """A layer with that error, where uniform attention has 0.8."""
  fit = FitReport(
    losses=np.ones(25),
    checked_steps=np.array([0, 25]),
    held_out=np.array(held_out),
    uniform=2.0,
    best_step=best_step,
    learning_rate=0.02,
  )
  none = FeatureVariables({}, {})
  head = np.array([error, error])
  found = Certificate(head, error, head, 0.8, head, head, head)
  found = found._replace(start=found)
  return LayerFigures(FittedLayer(name, none, none, fit), found, {})


def make_outcome(layers, *, same_answers=None, length=600):
  """Results of a command."""
  inputs = random_inputs(batch=1, length=4, num_heads=2, head_dim=4, seed=0)
  verdicts = {}
  if same_answers is not None:
    verdicts = {
      "teacher": Verdict(0.9, 0.1, 1.0, 1.0),
      "conversion": Verdict(0.9, 0.1, same_answers, 0.99),
      "oprf-orf": Verdict(0.5, 1.0, 0.95, 0.7),
    }
  return Outcome(
    Source([inputs], [inputs], False, "softmax", None),
    parse_pair("prototypes-none"),
    sf.feature_map("prototypes", "none", num_features=128),
    ExactKeys(),
    25,
    layers,
    [Speed(length, 1.0, 3.0, 10, 20)],
    verdicts,
    {},
  )


@pytest.mark.parametrize(
  ("error", "options", "sentence"),
  [
    (
      0.1,
      {"same_answers": 0.99},
      "Use the conversion: it gives the teacher's answer to 99.0 % of the dev "
      "examples; the largest error of a layer is 0.1 (layer_1, uniform 0.8); "
      "by the count of products it pays from 256 positions on, and at 600 it "
      "was 3 times as fast.",
    ),
    (
      0.7,
      {"length": 64},
      "Layer_1 keeps an error of 0.7 (uniform 0.8): give it --num_features "
      "256, a window, or leave it exact; by the count of products it pays from "
      "256 positions on, which is more than the 64 captured here.",
    ),
    (
      0.1,
      {"same_answers": 0.9},
      "The conversion gives the teacher's answer to 90.0 % of the dev examples "
      "only, so try more features, a window, or a short run of fine-tuning; "
      "oprf-orf without any fit gives it to 95.0 %; the largest error of a "
      "layer is 0.1 (layer_1, uniform 0.8); by the count of products it pays "
      "from 256 positions on, and at 600 it was 3 times as fast.",
    ),
  ],
)
def test_advice(error, options, sentence):
  layers = [layer_figures("layer_0", 0.05), layer_figures("layer_1", error)]
  assert advise(make_outcome(layers, **options)) == sentence


def test_layers_kept_at_their_start_are_named_first():
  layers = [
    layer_figures("layer_0", 0.1),
    layer_figures("layer_1", 0.1, best_step=0, held_out=(0.5, 0.6)),
    layer_figures("layer_2", 0.1, best_step=0, held_out=(3.0, 2.5)),
  ]
  lines = [line for line in report.warnings(make_outcome(layers)) if line]
  assert lines == [
    "**layer_1 is kept as it was before the fit: no step improves on its "
    "held-out loss, 0.5.**",
    "**layer_2 is kept as it was before the fit: its held-out loss stays above "
    "that of uniform attention, 2.**",
  ]
