import contextlib
import gc
import resource
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from absl import logging

from spectraformer_jax.nn import pretrained
from spectraformer_jax.train.run.checkpoints import Checkpointer, SaveError
from tests.train.helpers import broken_reads, make_state, save


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


def test_projections_of_integers_are_read_as_floats(tmp_path):
  # Earlier versions kept bits and indices as integers.
  with Checkpointer(tmp_path / "checkpoints", keep=1) as checkpointer:
    save(checkpointer, 1)
    bits = {"random_features": {"bits": np.zeros(4, np.float32)}}
    like = make_state(0)._replace(collections=bits)
    state, _ = checkpointer.restore(1, like)
  wanted = {"params": like.params, **bits}
  variables = pretrained._read_variables(tmp_path, 1, wanted)
  for found in (state.collections, variables):
    bits = found["random_features"]["bits"]
    np.testing.assert_array_equal(bits, np.arange(4))
    assert bits.dtype == np.float32


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


@pytest.fixture
def warnings(monkeypatch):
  """What is logged as a warning."""
  lines = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: lines.append(text % args)
  )
  return lines


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(content)


@broken_reads
@pytest.mark.parametrize("damage", [cut, flip, lambda path: path.unlink()])
def test_damaged_checkpoint_is_never_loaded(damage, tmp_path, warnings):
  whole = tmp_path / "whole"
  with Checkpointer(whole, keep=2) as checkpointer:
    save(checkpointer, 1)
    save(checkpointer, 2)
  newest = [path for path in (whole / "2").rglob("*") if path.stat().st_size]
  outcomes = []
  for number, path in enumerate(path for path in newest if path.is_file()):
    copy = tmp_path / str(number) / "checkpoints"
    shutil.copytree(whole, copy)
    damage(copy / path.relative_to(whole))
    warnings.clear()
    with Checkpointer(copy, keep=2) as checkpointer:
      state, record = checkpointer.restore_latest(make_state(0))
      step = int(state.step)
      # Not every file matters to what is read; what is read is right.
      assert record == {"note": step}
      np.testing.assert_array_equal(
        state.params["w"], make_state(step, step).params["w"]
      )
      said = [line for line in warnings if "going on from step 1" in line]
      assert len(said) == (step == 1), path
      save(checkpointer, 3)
      assert checkpointer.steps() == [step, 3]
    outcomes.append(step)
  assert outcomes.count(1) >= 3, (outcomes, newest)


@broken_reads
def test_warning_says_where_the_damaged_checkpoint_is(tmp_path, warnings):
  directory = tmp_path / "checkpoints"
  with Checkpointer(directory, keep=2) as checkpointer:
    save(checkpointer, 1)
    save(checkpointer, 2)
    cut(directory / "2" / "record" / "metadata")
    checkpointer.restore_latest(make_state(0))
    assert checkpointer.steps() == [1]
  (line,) = [line for line in warnings if "going on from step 1" in line]
  assert "checkpoint of step 2" in line
  assert str(tmp_path / "damaged_checkpoints" / "2") in line
  assert (tmp_path / "damaged_checkpoints" / "2" / "state").exists()


@broken_reads
def test_no_checkpoint_can_be_read(tmp_path):
  with Checkpointer(tmp_path, keep=2) as checkpointer:
    assert checkpointer.restore_latest(make_state(0)) is None
    save(checkpointer, 1)
    save(checkpointer, 2)
    # Another model, not damage: nothing is moved away.
    like = make_state(0)._replace(params={"w": np.zeros((5, 3), np.float32)})
    with pytest.raises(ValueError, match=r"None of the .*\[1, 2\].*'w'"):
      checkpointer.restore_latest(like)
    assert checkpointer.steps() == [1, 2]


@contextlib.contextmanager
def largest_file(size):
  """Writes beyond that size fail, as they do when the disk is full."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.filterwarnings(  # what orbax's writers leave behind
  "ignore::pytest.PytestUnhandledThreadExceptionWarning",
  "ignore::pytest.PytestUnraisableExceptionWarning",
)
def test_failed_save_keeps_the_older_checkpoint(tmp_path):
  noise = np.random.default_rng(0).random((200, 1000))  # not compressible
  state = make_state(2)._replace(params={"w": noise})
  with Checkpointer(tmp_path, keep=1) as checkpointer:
    checkpointer.save(state._replace(step=np.int32(1)), {}, best_step=1)
    with (
      largest_file(100_000),
      pytest.raises(SaveError, match=r"step 2 could not.*steps \[1\]. Cause"),
    ):
      checkpointer.save(state, {}, best_step=1)
    assert checkpointer.steps() == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["1"]
    checkpointer.save(state, {}, best_step=2)
    assert checkpointer.steps() == [2]
  gc.collect()  # here, so that no later test is blamed for their coroutines
