"""Turns attention of trained models into linear attention.

For each layer, a feature map is fitted so that its weights are like those of
the softmax; nothing else of the model changes, and no labels are needed.
"""

from spectraformer_jax.linearize.certificate import certify
from spectraformer_jax.linearize.fit import fit_feature_map
from spectraformer_jax.linearize.layers import fit_layers
from spectraformer_jax.linearize.loading import in_order, load
from spectraformer_jax.linearize.recording import recording_attention_fn
from spectraformer_jax.linearize.records import (
  Certificate,
  FitReport,
  FittedLayer,
  NonFiniteLossError,
)
from spectraformer_jax.linearize.start import start_from_data
from spectraformer_jax.study.approximation.inputs import write_npz

__all__ = [
  "Certificate",
  "FitReport",
  "FittedLayer",
  "NonFiniteLossError",
  "certify",
  "fit_feature_map",
  "fit_layers",
  "in_order",
  "load",
  "recording_attention_fn",
  "start_from_data",
  "write_npz",
]
