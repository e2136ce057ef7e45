"""Settings of every test: compilation cache, strict ranks, no surprises."""

import collections
import hashlib
import os
import pathlib
import zlib

# Before jax is imported: settings that its start-up reads.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR",
  str(pathlib.Path(__file__).parent.parent / ".jax_cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Most of a test's time is XLA's compiler. Whoever sets this to 0 tests programs
# optimized as users' are; CI does, for the slow cases.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest


def pytest_addoption(parser):
  parser.addoption(
    "--part",
    metavar="K/N",
    help="with -m slow: run part K (from 0) of N, which together are all",
  )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
  """Marks slow what `quick_every` leaves out; keeps the cases of `--part`."""
  cases = collections.defaultdict(list)
  for item in items:
    is_slow = item.get_closest_marker("slow")
    if item.get_closest_marker("quick_every") and not is_slow:
      cases[item.path, item.originalname].append(item)
  for group in cases.values():
    (step,) = group[0].get_closest_marker("quick_every").args
    for number, item in enumerate(group):
      if number % step:
        item.add_marker("slow")
  if part := config.getoption("--part"):
    number, count = map(int, part.split("/"))
    in_part = lambda item: zlib.crc32(item.nodeid.encode()) % count == number
    config.hook.pytest_deselected(
      items=[item for item in items if not in_part(item)]
    )
    items[:] = filter(in_part, items)


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
