"""Pieces that several weight matrices share: rotations, norms, fixed tables.

Tables that depend on sizes alone are cached, read-only NumPy arrays.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import gammainc, gammaincc, gammaln, ndtri

from spectraformer_jax.registry import check_choice
from spectraformer_jax.typing import Array

CHI_OR_EQUAL = ("chi", "sqrt_d")


def normal(rng: Array, shape: tuple[int, ...]) -> Array:
  """Draws independent N(0, 1) entries, float32 even if JAX's x64 mode is on."""
  return jax.random.normal(rng, shape, dtype=jnp.float32)


def random_signs(rng: Array, shape: tuple[int, ...]) -> Array:
  """Draws independent entries of -1 and +1, float32."""
  return jax.random.rademacher(rng, shape, jnp.float32)


def haar(rng: Array, num_blocks: int, dim: int) -> Array:
  """Draws independent uniform (Haar) orthogonal matrices.

  Uses one batched QR decomposition, with the signs that make its Q uniform.
  Without these signs the entries of a row have nonzero means, and every
  positive map is biased.

  Args:
    rng: PRNG key.
    num_blocks: number of matrices.
    dim: number of rows of each matrix.

  Returns:
    ``[num_blocks, dim, dim]`` float32.

  Example:
    >>> q = haar(jax.random.key(0), 3, 4)
    >>> bool(jnp.allclose(q[1] @ q[1].T, jnp.eye(4), atol=1e-5))
    True
  """
  with jax.default_matmul_precision("highest"):
    return jax.random.orthogonal(rng, dim, (num_blocks,), dtype=jnp.float32)


def random_permutations(rng: Array, shape: tuple[int, ...]) -> Array:
  """Draws independent permutations of 0 .. n - 1.

  Args:
    rng: PRNG key.
    shape: ``(..., n)``.

  Returns:
    ``[..., n]`` int32.

  Example:
    >>> permutations = random_permutations(jax.random.key(0), (2, 5))
    >>> jnp.sort(permutations).tolist()
    [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4]]
  """
  identity = jnp.broadcast_to(jnp.arange(shape[-1], dtype=jnp.int32), shape)
  return jax.random.permutation(rng, identity, axis=-1, independent=True)


def chi_norms(rng: Array, num_rows: int, dim: int) -> Array:
  """Draws the norms of independent N(0, I_dim) vectors: ``[num_rows]`` float32.

  Example:
    >>> chi_norms(jax.random.key(0), 5, 8).shape
    (5,)
  """
  gaussian = normal(rng, (num_rows, dim))
  return jnp.sqrt(jnp.sum(jnp.square(gaussian), axis=-1))


def check_norms(norms: str) -> None:
  """Raises ValueError unless `norms` is "chi" or "sqrt_d"."""
  check_choice("norms", norms, CHI_OR_EQUAL)


def row_norms(rng: Array, norms: str, num_rows: int, dim: int) -> Array:
  """Draws norms of rows.

  Args:
    rng: PRNG key.
    norms: "chi" (independent, of the chi law), "sqrt_d" (all sqrt(dim)) or
      "stratified" (of the chi law, one in each of M cells of probability 1/M).
    num_rows: M.
    dim: degrees of freedom of the chi law.

  Returns:
    ``[M]`` float32.
  """
  if norms == "sqrt_d":
    return jnp.full((num_rows,), np.sqrt(dim), jnp.float32)
  if norms == "stratified":
    return chi_ppf(stratified_uniforms(rng, num_rows), dim)
  return chi_norms(rng, num_rows, dim)


def set_norms(rows: Array, norms: Array) -> Array:
  """Scales nonzero rows ``[M, H]`` to the given norms ``[M]``.

  Example:
    >>> set_norms(jnp.array([[3.0, 4.0]]), jnp.array([10.0])).tolist()
    [[6.0, 8.0]]
  """
  lengths = jnp.sqrt(jnp.sum(jnp.square(rows), axis=-1))
  return (norms / lengths)[:, None] * rows


def chi_rows(rng: Array, rows: Array) -> Array:
  """Scales rows ``[M, H]`` to the norms of independent Gaussian rows.

  A zero row has no direction and becomes a Gaussian row. (Dropping columns of a
  larger matrix can leave zero rows.)

  Example:
    >>> w = chi_rows(jax.random.key(0), jnp.array([[3.0, 0.0], [0.0, 0.0]]))
    >>> bool(w[0, 0] > 0.0), bool(w[0, 1] == 0.0), bool((w[1] != 0.0).all())
    (True, True, True)
  """
  return rescale_rows(rows, normal(rng, rows.shape))


def rescale_rows(rows: Array, gaussian: Array) -> Array:
  """Scales each row to the norm of the same row of `gaussian`: ``[M, H]``.

  A zero row becomes the row of `gaussian`. The result is differentiable in
  `rows`.
  """
  square = jnp.sum(jnp.square(rows), axis=-1, keepdims=True)
  gaussian_square = jnp.sum(jnp.square(gaussian), axis=-1, keepdims=True)
  # A row that is zero but for rounding errors has a square of about 1e-12.
  nonzero = square > 1e-8
  scale = jnp.sqrt(gaussian_square / jnp.where(nonzero, square, 1.0))
  return jnp.where(nonzero, rows * scale, gaussian)


def antithetic_rows(half: Array, num_rows: int) -> Array:
  """Stacks rows and their negatives, ``(B; -B)``, and keeps `num_rows` rows.

  Args:
    half: B, ``[ceil(num_rows / 2), H]``.
    num_rows: M; if it is odd, the negative of the last row is left out.

  Returns:
    ``[M, H]``.

  Example:
    >>> antithetic_rows(jnp.array([[1.0], [2.0]]), 3)[:, 0].tolist()
    [1.0, 2.0, -1.0]
  """
  return jnp.concatenate([half, -half])[:num_rows]


def chi_ppf(u: Array, dim: float) -> Array:
  """Inverts the cdf of the chi law, the law of the norm of N(0, I_dim).

  Solves ``gammainc(dim / 2, r^2 / 2) = u`` by six Newton steps in log(r^2 / 2),
  from the Wilson-Hilferty approximation. The start is raised to a lower bound
  of the quantile, since from less the steps diverge for small u and dim.
  Above u = 1/2 the steps solve for the upper tail, where 1 - u has more digits.

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
  lower_bound = jnp.exp((jnp.log(u) + gammaln(a + 1.0)) / a)
  start = jnp.maximum(a * cubed**3, lower_bound)
  upper = u > 0.5

  def newton(_: Array, t: Array) -> Array:
    below = gammainc(a, t) - u
    above = (1.0 - u) - gammaincc(a, t)
    slope = jnp.exp(a * jnp.log(t) - t - log_gamma)
    step = jnp.where(upper, above, below) / slope
    return t * jnp.exp(-jnp.clip(step, -0.5, 0.5))

  return jnp.sqrt(2.0 * jax.lax.fori_loop(0, 6, newton, start))


def stratified_uniforms(rng: Array, num: int) -> Array:
  """Draws one number in each cell (i / num, (i + 1) / num), in random order.

  Each number alone is uniform on (0, 1). All numbers are midpoints of a finer
  grid of at most 2**23 intervals, so none is 0 or 1 or is rounded into the next
  cell.

  Args:
    rng: PRNG key.
    num: number of cells, at most 2**22.

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
  """Returns the least power of two that is at least n.

  Example:
    >>> [next_power_of_two(n) for n in (1, 5, 8)]
    [1, 8, 8]
  """
  return 1 << (n - 1).bit_length()


def read_only(table: np.ndarray) -> np.ndarray:
  """Makes a table read-only and returns it; callers share cached tables."""
  table.setflags(write=False)
  return table


@functools.lru_cache
def hadamard(n: int) -> np.ndarray:
  """Returns Sylvester's Hadamard matrix divided by sqrt(n).

  This matrix is symmetric and orthogonal.

  Args:
    n: a power of two.

  Returns:
    ``[n, n]`` float32, NumPy, read-only.

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
  return read_only((table / np.sqrt(n)).astype(np.float32))


@functools.lru_cache
def simplex(k: int, dim: int) -> np.ndarray:
  """Returns unit vectors to the corners of a regular simplex.

  All inner products are -1 / (k - 1), the least value that all pairs can share,
  and the vectors sum to zero. A single vector, k = 1, is the first axis.

  Args:
    k: number of vectors, at most dim + 1.
    dim: number of entries of each vector.

  Returns:
    ``[k, dim]`` float32, NumPy, read-only.

  Raises:
    ValueError: k is not in 1 .. dim + 1.

  Example:
    >>> (simplex(3, 4) @ simplex(3, 4).T)[0].round(3).tolist()
    [1.0, -0.5, -0.5]
  """
  if not 1 <= k <= dim + 1:
    raise ValueError(f"k must be in 1 .. dim + 1 = {dim + 1}, got {k}.")
  corners = np.zeros((k, dim))
  # Columns of the Helmert basis: orthonormal, and orthogonal to (1, ..., 1).
  for j in range(1, k):
    corners[:j, j - 1] = 1.0
    corners[j, j - 1] = -j
    corners[:, j - 1] /= np.sqrt(j * (j + 1.0))
  if k == 1:
    corners[0, 0] = 1.0
  else:
    corners *= np.sqrt(k / (k - 1.0))
  return read_only(corners.astype(np.float32))
