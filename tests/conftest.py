"""Settings of every test: compilation cache, strict ranks, no surprises."""

import hashlib
import os
import pathlib

# Before jax is imported: settings that its start-up reads.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parent.parent / ".jax_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax
import pytest


@pytest.fixture(autouse=True)
def strict_ranks():
  """A missing axis is an error in tests, not a silent broadcast."""
  with jax.numpy_rank_promotion("raise"):
    yield


@pytest.fixture
def rng():
  """A fixed PRNG key."""
  return jax.random.key(0)


@pytest.fixture
def pin():
  """A function that pins a package to a made-up file until the test ends."""
  pinned = []

  def pin(package, path):
    pinned.append((package, package.sha256))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    object.__setattr__(package, "sha256", digest)
    return path

  yield pin
  for package, digest in reversed(pinned):
    object.__setattr__(package, "sha256", digest)
