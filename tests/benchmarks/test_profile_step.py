"""The profile of a training step sorts operations by their names."""

import pytest

from benchmarks import profile_step

LAYER = "SequenceEncoder_0/TokenEncoder_0/encoder/layer_1"


@pytest.mark.parametrize(
  ("name", "part", "kind"),
  [
    (
      f"jvp(Classifier)/{LAYER}/attention/jit(_spectral_attention)/jit(attend)/"
      "while/body/closed_call/th,mh->tm/dot_general",
      "attention: features and sums",
      "forward",
    ),
    (
      f"transpose(jvp(Classifier))/{LAYER}/attention/query/transpose",
      "attention: query, key, value, output",
      "backward",
    ),
    (
      f"transpose(jvp(Classifier))/{LAYER}/while/body/closed_call/checkpoint/"
      "rematted_computation/layer_1.step/Dense_0/dot_general",
      "MLP",
      "again",
    ),
    (f"jvp(Classifier)/{LAYER}/Dropout_0/mul", "dropout", "forward"),
    (
      f"transpose(jvp(Classifier))/{LAYER}/while/body/closed_call/checkpoint/"
      "layer_1.step/LayerNorm_1/reduce_sum",
      "layer norms",
      "backward",
    ),
    (f"jvp(Classifier)/{LAYER}/add", "residuals, loops over tokens", "forward"),
    ("add", "optimiser, copies, the rest", "other"),
  ],
)
def test_operations_are_sorted_by_name(name, part, kind):
  name = f"jit(train_step)/{name}"
  assert profile_step.part_of(name) == part
  assert profile_step.pass_of(name) == kind
