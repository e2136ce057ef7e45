import jax.numpy as jnp
import numpy as np
import pytest

from spectraformer_jax.train.checkpoints import Checkpointer
from spectraformer_jax.train.state import TrainState


def make_state(step, value=0.0):
  return TrainState(
    np.asarray(step, np.int32),
    {"w": np.full((2, 3), value, np.float32)},
    {"random_features": {"bits": np.arange(4, dtype=np.uint8)}},
    ({"count": np.asarray(step, np.int32)}, ()),
  )


def save(checkpointer, step, best_step=None):
  checkpointer.save(make_state(step, step), {"note": step}, best_step=best_step)


def test_round_trip(tmp_path):
  with Checkpointer(tmp_path, keep=2) as checkpointer:
    save(checkpointer, 3)
  with Checkpointer(tmp_path, keep=2) as checkpointer:
    state, record = checkpointer.restore(3, make_state(0))
  assert record == {"note": 3}
  assert state.step == 3 and state.opt_state[0]["count"] == 3
  np.testing.assert_array_equal(state.params["w"], np.full((2, 3), 3.0))
  bits = state.collections["random_features"]["bits"]
  np.testing.assert_array_equal(bits, np.arange(4))
  assert bits.dtype == np.uint8


def test_device_arrays_serve_as_the_target(tmp_path):
  with Checkpointer(tmp_path, keep=1) as checkpointer:
    save(checkpointer, 1)
    like = make_state(0)._replace(params={"w": jnp.zeros((2, 3))})
    state, _ = checkpointer.restore(1, like)
  assert isinstance(state.params["w"], np.ndarray)


def test_last_and_best_stay(tmp_path):
  with Checkpointer(tmp_path, keep=2) as checkpointer:
    save(checkpointer, 10, best_step=10)
    for step in (20, 30, 40):
      save(checkpointer, step, best_step=10)
    assert checkpointer.steps() == [10, 30, 40]
    save(checkpointer, 50, best_step=50)
    # The one before the last still names 10 as its best.
    assert checkpointer.steps() == [10, 40, 50]
    save(checkpointer, 60, best_step=50)
    assert checkpointer.steps() == [50, 60]


def test_remains_of_a_kill_do_not_count(tmp_path):
  with Checkpointer(tmp_path, keep=2) as checkpointer:
    save(checkpointer, 1, best_step=1)
    save(checkpointer, 2, best_step=1)
  # A save that was cut short, and a deletion that was.
  half = tmp_path / "3.orbax-checkpoint-tmp"
  half.mkdir()
  (half / "state").mkdir()
  with Checkpointer(tmp_path, keep=2) as checkpointer:
    assert checkpointer.steps() == [1, 2]
    save(checkpointer, 3, best_step=1)
    assert checkpointer.steps() == [1, 2, 3]


def test_other_shapes_are_refused(tmp_path):
  with Checkpointer(tmp_path, keep=1) as checkpointer:
    save(checkpointer, 1)
    like = make_state(0)._replace(params={"w": np.zeros((5, 3), np.float32)})
    with pytest.raises(ValueError, match=r"'w'.*float32\(2, 3\).*\(5, 3\)"):
      checkpointer.restore(1, like)
