"""Rows as a measurement would give them."""

from spectraformer_jax.study.approximation.results import FIGURES, KEYS, Row


def row(pair="posrf-iid", num_features=64, error=0.5, **changes):
  """A row; `changes` are keys or figures."""
  component, matrix = pair.split("-")
  key = {
    **{"inputs": "random", "fingerprint": "f00", "length": 256, "scale": 1.0},
    **{"component": component, "matrix": matrix, "num_features": num_features},
    **{"is_causal": "False", "target": "softmax", "draws": 10, "seed": 0},
    "points": 32,
  }
  figures = dict.fromkeys(FIGURES) | {
    **{"error": error, "error_ci": 0.01, "error_std": 0.014},
    **{"uniform_error": 0.8, "ms": 2.0, "exact_ms": 1.0},
    **{"temp_mib": 1.0, "exact_temp_mib": 4.0, "kernel_mse_median": 1.5},
  }
  for name, value in changes.items():
    (key if name in KEYS else figures)[name] = value
  return Row(key, figures, "cpu")
