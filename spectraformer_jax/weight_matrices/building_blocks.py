"""What several weight matrices are made of: rotations, norms, fixed tables.

Tables that depend on sizes alone are numpy, cached and read-only.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammainc, gammaincc, gammaln, ndtri

from spectraformer_jax.typing import Array

NORMS = ("chi", "sqrt_d")


def haar(rng: Array, num_blocks: int, dim: int) -> Array:
  """Independent uniform (Haar) orthogonal matrices.

  One batched QR for all blocks, with the signs that make it uniform: without
  them row signs are biased, and so is every positive map.

  Args:
    rng: PRNG key.
    num_blocks: how many.
    dim: of each.

  Returns:
    ``[num_blocks, dim, dim]`` float32.

  Example:
    >>> q = haar(jax.random.key(0), 3, 4)
    >>> bool(jnp.allclose(q[1] @ q[1].T, jnp.eye(4), atol=1e-5))
    True
  """
  with jax.default_matmul_precision("highest"):
    return jax.random.orthogonal(rng, dim, (num_blocks,), dtype=jnp.float32)


def chi_norms(rng: Array, num_rows: int, dim: int) -> Array:
  """Norms of independent vectors of N(0, I_dim): ``[num_rows]`` float32.

  Example:
    >>> chi_norms(jax.random.key(0), 5, 8).shape
    (5,)
  """
  gaussian = jax.random.normal(rng, (num_rows, dim), dtype=jnp.float32)
  return jnp.sqrt(jnp.sum(jnp.square(gaussian), axis=-1))


def check_norms(norms: str) -> None:
  """ValueError unless `norms` is "chi" or "sqrt_d"."""
  if norms not in NORMS:
    raise ValueError(f"norms must be one of {NORMS}, got {norms!r}.")


def row_norms(rng: Array, norms: str, num_rows: int, dim: int) -> Array:
  """Norms ``[num_rows]``: `chi_norms` for "chi", sqrt(dim) for "sqrt_d"."""
  if norms == "sqrt_d":
    return jnp.full((num_rows,), np.sqrt(dim), jnp.float32)
  return chi_norms(rng, num_rows, dim)


def chi_rows(rng: Array, rows: Array) -> Array:
  """The directions of `rows` with fresh chi norms: ``[M, H]`` float32.

  A zero row, which has no direction (truncated columns can leave one), becomes
  a Gaussian row.

  Example:
    >>> w = chi_rows(jax.random.key(0), jnp.array([[3.0, 0.0], [0.0, 0.0]]))
    >>> bool(w[0, 0] > 0.0), bool(w[0, 1] == 0.0), bool((w[1] != 0.0).all())
    (True, True, True)
  """
  return rescale_rows(
    rows, jax.random.normal(rng, rows.shape, dtype=jnp.float32)
  )


def rescale_rows(rows: Array, gaussian: Array) -> Array:
  """The directions of `rows` with the norms of `gaussian`, both ``[M, H]``.

  A zero row becomes the row of `gaussian`. Differentiable in `rows`.
  """
  square = jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
  gaussian_square = jnp.sum(jnp.square(gaussian), axis=-1, keepdims=True)
  # Rounding leaves some 1e-12 of a row whose entries cancel.
  nonzero = square > 1e-8
  scale = jnp.sqrt(gaussian_square / jnp.where(nonzero, square, 1.0))
  return jnp.where(nonzero, rows * scale, gaussian)


def antithetic_rows(half: Array, num_rows: int) -> Array:
  """``(B; -B)``, cut to `num_rows`: every row beside its opposite.

  Args:
    half: B, ``[ceil(num_rows / 2), H]``.
    num_rows: M; if odd, the last row has no opposite.

  Returns:
    ``[M, H]``.

  Example:
    >>> antithetic_rows(jnp.array([[1.0], [2.0]]), 3)[:, 0].tolist()
    [1.0, 2.0, -1.0]
  """
  return jnp.concatenate([half, -half])[:num_rows]


def chi_ppf(u: Array, dim: int) -> Array:
  """Inverse cdf of the chi law: the norm of N(0, I_dim) at quantile u.

  Six Newton steps in log(r^2 / 2) for the regularised incomplete gamma
  function, from the Wilson-Hilferty start; the start is floored by a lower
  bound, without which small u at small dim diverge. Above 1/2 the upper tail
  is solved for, where 1 - u keeps its digits.

  Args:
    u: any shape, float32, inside (0, 1).
    dim: degrees of freedom.

  Returns:
    Same shape, float32; relative error below 1e-5 in [1e-6, 1 - 1e-6] for
    dim 1 to 256 (measured), and in all of [2**-24, 1 - 2**-24] from dim 3.

  Example:
    >>> round(float(chi_ppf(jnp.float32(0.5), 2)), 3)  # sqrt(2 log 2)
    1.177
  """
  a = jnp.float32(dim / 2.0)
  log_gamma = gammaln(a)
  c = 2.0 / (9.0 * dim)
  cubed = 1.0 - c + ndtri(u) * np.float32(np.sqrt(c))
  floor = jnp.exp((jnp.log(u) + gammaln(a + 1.0)) / a)
  start = jnp.maximum(a * cubed**3, floor)
  upper = u > 0.5

  def newton(_, t):
    below = gammainc(a, t) - u
    above = (1.0 - u) - gammaincc(a, t)
    slope = jnp.exp(a * jnp.log(t) - t - log_gamma)
    step = jnp.where(upper, above, below) / slope
    return t * jnp.exp(-jnp.clip(step, -0.5, 0.5))

  return jnp.sqrt(2.0 * jax.lax.fori_loop(0, 6, newton, start))


def stratified_uniforms(rng: Array, num: int) -> Array:
  """Uniforms in random order, one inside each cell ((i) / num, (i + 1) / num).

  Each of them alone is uniform. They are midpoints of a grid of at most
  2**23 cells: strictly inside (0, 1), and never rounded into the next cell.

  Args:
    rng: PRNG key.
    num: how many, at most 2**22.

  Returns:
    ``[num]`` float32.

  Example:
    >>> u = stratified_uniforms(jax.random.key(0), 4)
    >>> [int(cell) for cell in jnp.sort(jnp.floor(4 * u))]
    [0, 1, 2, 3]
  """
  order_rng, inside_rng = jax.random.split(rng)
  cells = jax.random.permutation(order_rng, num)
  depth = 23 - (num - 1).bit_length()
  inside = jax.random.bits(inside_rng, (num,), jnp.uint32) >> (32 - depth)
  points = cells.astype(jnp.uint32) * np.uint32(1 << depth) + inside
  return (points.astype(jnp.float32) + 0.5) / jnp.float32(num << depth)


def next_power_of_two(n: int) -> int:
  """The least power of two that is not below n.

  Example:
    >>> [next_power_of_two(n) for n in (1, 5, 8)]
    [1, 8, 8]
  """
  return 1 << (n - 1).bit_length()


@functools.lru_cache
def hadamard(n: int) -> np.ndarray:
  """Sylvester's Hadamard matrix over sqrt(n): symmetric and orthogonal.

  Args:
    n: a power of two.

  Returns:
    ``[n, n]`` float32, numpy, read-only.

  Raises:
    ValueError: n is not a power of two.

  Example:
    >>> (hadamard(2) * 2**0.5).round(3).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
  """
  if n < 1 or n & (n - 1):
    raise ValueError(f"n must be a power of two, got {n}.")
  table = np.ones((1, 1))
  while len(table) < n:
    table = np.block([[table, table], [table, -table]])
  return _frozen(table / np.sqrt(n))


@functools.lru_cache
def simplex(k: int, dim: int) -> np.ndarray:
  """Unit vectors with the same angle between any two: corners of a simplex.

  Inner products are -1 / (k - 1), the least that all pairs can have, and the
  vectors sum to zero (a single one, k = 1, is the first axis).

  Args:
    k: how many, at most dim + 1.
    dim: of each.

  Returns:
    ``[k, dim]`` float32, numpy, read-only.

  Raises:
    ValueError: k is not in 1 .. dim + 1.

  Example:
    >>> (simplex(3, 4) @ simplex(3, 4).T)[0].round(3).tolist()
    [1.0, -0.5, -0.5]
  """
  if not 1 <= k <= dim + 1:
    raise ValueError(f"k must be in 1 .. dim + 1 = {dim + 1}, got {k}.")
  corners = np.zeros((k, dim))
  if k == 1:
    corners[0, 0] = 1.0
    return _frozen(corners)
  # Columns of the Helmert basis: orthonormal, and orthogonal to (1, ..., 1).
  for j in range(1, k):
    corners[:j, j - 1] = 1.0
    corners[j, j - 1] = -j
    corners[:, j - 1] /= np.sqrt(j * (j + 1.0))
  return _frozen(corners * np.sqrt(k / (k - 1.0)))


def simplex_full(dim: int) -> np.ndarray:
  """The largest `simplex` of R^dim: dim + 1 corners, inner products -1/dim.

  Example:
    >>> simplex_full(4).shape
    (5, 4)
  """
  return simplex(dim + 1, dim)


def _frozen(table: np.ndarray) -> np.ndarray:
  """Float32 and read-only: it is shared by all who ask for it."""
  table = table.astype(np.float32)
  table.setflags(write=False)
  return table
