import gc
import threading
import time

import numpy as np
import pytest

from spectraformer_jax.data import Batches, Prefetch


def prefetch_threads():
  return [t for t in threading.enumerate() if t.name == "prefetch"]


class Failing(Batches):
  """Raises in place of its third batch."""

  def __next__(self):
    if self.state()["step"] == 2:
      raise OSError("disk gone")
    return super().__next__()


def test_same_batches_and_states_as_without(make_toy):
  plain = Batches(make_toy(), 5, seed=0, train=True)
  with Prefetch(Batches(make_toy(), 5, seed=0, train=True)) as ahead:
    assert ahead.state() == plain.state()
    for _ in range(11):
      expected, got = next(plain), next(ahead)
      for name in expected:
        np.testing.assert_array_equal(expected[name], got[name])
      assert ahead.state() == plain.state()


def test_state_is_the_consumers_however_far_ahead_the_thread_is(make_toy):
  toy = make_toy(60)
  batches = Batches(toy, 5, seed=0, train=True)
  with Prefetch(batches) as ahead:
    next(ahead)
    deadline = time.monotonic() + 10
    while batches.state()["step"] < 4 and time.monotonic() < deadline:
      time.sleep(0.01)
    # One taken, two in the queue, one waiting to be put there.
    assert batches.state()["step"] == 4
    assert ahead.state()["step"] == 1
    resumed = Batches(toy, 5, seed=0, train=True, state=ahead.state())
    np.testing.assert_array_equal(
      next(resumed)["tokens"], next(ahead)["tokens"]
    )


def test_evaluation_ends(make_toy):
  with Prefetch(Batches(make_toy(), 5, seed=0, train=False)) as ahead:
    assert sum(batch["weight"].sum() for batch in ahead) == 23
    for _ in range(2):
      with pytest.raises(StopIteration):
        next(ahead)


def test_errors_reach_the_consumer_after_the_batches_before_them(make_toy):
  with Prefetch(Failing(make_toy(), 5, seed=0, train=True)) as ahead:
    next(ahead), next(ahead)
    for _ in range(2):
      with pytest.raises(OSError, match="disk gone"):
        next(ahead)
    assert ahead.state()["step"] == 2


def test_close_ends_the_thread_at_once(make_toy):
  ahead = Prefetch(Batches(make_toy(), 5, seed=0, train=True))
  next(ahead)
  assert len(prefetch_threads()) == 1
  ahead.close()
  assert not prefetch_threads()
  with pytest.raises(StopIteration):
    next(ahead)
  ahead.close()


def test_the_thread_ends_with_an_abandoned_iterator(make_toy):
  ahead = Prefetch(Batches(make_toy(), 5, seed=0, train=True))
  next(ahead)
  (thread,) = prefetch_threads()
  del ahead
  gc.collect()
  thread.join(10)
  assert not thread.is_alive()
