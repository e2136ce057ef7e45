"""Helpers of tests in several folders: maps, estimates, code of pages."""

import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import spectraformer_jax as sf
from spectraformer_jax import testing
from spectraformer_jax.components import COMPONENTS
from spectraformer_jax.testing.checks import PAIRS as PAIRS
from spectraformer_jax.weight_matrices import WEIGHT_MATRICES

ROOT = pathlib.Path(__file__).parent.parent


def smallest_map(component, matrix, *, head_dim):
  """Builds the pair of these names with as few features as it accepts."""
  component = COMPONENTS.build(component)
  matrix = WEIGHT_MATRICES.build(matrix)
  num_features = testing.smallest_num_features(
    component, matrix, head_dim=head_dim
  )
  return sf.compose(component, matrix, num_features=num_features)


def estimates(feature_map, rng, pairs, num_draws, stats=None, variables=None):
  """Draws independent estimates of the kernel at pairs of vectors.

  Args:
    feature_map: the map.
    rng: PRNG key.
    pairs: ``[P, 2, H]``, scaled.
    num_draws: R.
    stats: stats of both sides.
    variables: variables with the params of all draws; None: each draws its own.

  Returns:
    ``[R, P]`` float32.
  """
  x, y = jnp.asarray(pairs[:, 0]), jnp.asarray(pairs[:, 1])
  head_dim = x.shape[-1]

  @jax.jit
  def one_draw(rng):
    drawn = feature_map.init(rng, head_dim=head_dim)
    if variables is not None:
      drawn = drawn._replace(params=variables.params)
    apply = lambda points, side: feature_map.apply(
      drawn, points[None, :, None, :], side=side, stats=stats
    )[0, :, 0]
    return jnp.sum(apply(x, "query") * apply(y, "key"), axis=-1)

  return np.asarray(jax.lax.map(one_draw, jax.random.split(rng, num_draws)))


def standard_scores(samples, expected):
  """Returns (mean - expected) in standard errors of the mean, per column."""
  samples = samples.astype(np.float64)
  error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
  # Exact estimates differ by the rounding of one float32 value.
  rounding = 1e-6 * np.abs(expected)
  return (samples.mean(axis=0) - expected) / np.maximum(error, rounding)


def python_blocks(page):
  """The Python blocks of a page of the repository, in order."""
  text = (ROOT / page).read_text()
  return re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def run_python(code, folder, timeout=300):
  """Runs code as a script in a new interpreter; the finished process."""
  script = folder / "script.py"
  script.write_text(code)
  return subprocess.run(
    [sys.executable, str(script)],
    env={**os.environ, "PYTHONPATH": str(ROOT)},
    cwd=folder,
    capture_output=True,
    text=True,
    timeout=timeout,
    check=False,
  )
