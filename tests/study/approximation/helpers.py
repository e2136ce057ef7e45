"""Measurements whose figures are made up."""

from spectraformer_jax.study.approximation.results import (
  Figures,
  Key,
  Measurement,
)


def row(pair="posrf-iid", num_features=64, error=0.5, **changes):
  """A measurement; `changes` are fields of its key or figures."""
  component, matrix = pair.split("-")
  key = Key(
    "random",
    "f00",
    256,
    1.0,
    component,
    matrix,
    num_features,
    False,
    "softmax",
    10,
    0,
    32,
  )
  figures = Figures(
    error,
    0.01,
    0.014,
    0.8,
    None,
    None,
    kernel_mse_median=1.5,
    ms=2.0,
    exact_ms=1.0,
    temp_mib=1.0,
    exact_temp_mib=4.0,
    compile_s=3.0,
  )
  of_key = {name: changes.pop(name) for name in Key._fields if name in changes}
  return Measurement(key._replace(**of_key), figures._replace(**changes), "cpu")
