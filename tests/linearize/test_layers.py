import dataclasses

import jax
import numpy as np
import pytest

import spectraformer_jax as sf
from spectraformer_jax.linearize import fit, fit_layers, layer_files, start
from tests.linearize.helpers import HEAD_DIM, HEADS, build_map, layer

NAMES = ("layer_0", "left/layer_1", "layer_10")


def fit_all(out=None, *, names=NAMES, inputs=None, **options):
  """Fits maps to a layer of each name."""
  number = {name: seed for seed, name in enumerate(NAMES)}
  return fit_layers(
    inputs or [layer(name, number[name]) for name in names],
    held_out=[layer(name, 10 + number[name]) for name in names],
    out=out,
    **{
      "feature_map": build_map()["feature_map"],
      "rng": jax.random.key(3),
      "steps": 30,
      "rows": 8,
    }
    | options,
  )


def files(folder):
  """The content of all files, by path."""
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


def assert_same(layers, others):
  """Asserts that layers are equal, but for the time of the fits."""
  without_time = lambda x: x._replace(report=x.report._replace(seconds=None))
  for one, two in zip(layers, others, strict=True):
    one, two = without_time(one), without_time(two)
    assert jax.tree.structure(one) == jax.tree.structure(two)
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_call_that_was_stopped_goes_on_bit_by_bit(tmp_path):
  whole = fit_all(tmp_path / "whole")
  fitted = []

  def stop(name, step):
    fitted.append((name, step))
    if (name, step) == (NAMES[1], 25):
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    fit_all(tmp_path / "parts", on_progress=stop)
  assert list(files(tmp_path / "parts")) == ["layers/layer_0.npz"]
  fitted.clear()
  parts = fit_all(tmp_path / "parts", on_progress=lambda *x: fitted.append(x))
  assert fitted[:3] == [(NAMES[0], 30), (NAMES[1], 25), (NAMES[1], 30)]
  assert files(tmp_path / "parts") == files(tmp_path / "whole")
  assert sorted(files(tmp_path / "whole")) == [
    "layers/layer_0.npz",
    "layers/layer_10.npz",
    "layers/left/layer_1.npz",
  ]
  assert_same(parts, whole)
  assert [x.name for x in whole] == list(NAMES)
  assert parts[0].report.seconds is None and whole[0].report.seconds > 0
  assert_same(fit_all(), whole)


def test_a_layer_does_not_depend_on_the_others(tmp_path):
  (alone,) = fit_all(names=NAMES[2:])
  assert_same([alone], fit_all()[2:])
  rows = lambda layer: layer.start.params["component"]["query_rows"]
  assert (rows(fit_all()[0]) != rows(alone)).all()


def test_layers_of_one_shape_share_their_programs():
  programs = (fit._step, fit._check, start._start)
  # A number of rows that no other test has.
  before = [program._cache_size() for program in programs]
  fit_all(rows=7, feature_map=build_map(num_features=5)["feature_map"])
  after = [program._cache_size() for program in programs]
  assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]
  # Neither the number of steps nor the rate is part of a program.
  fit_all(
    rows=7,
    feature_map=build_map(num_features=5)["feature_map"],
    steps=20,
    learning_rate=0.1,
  )
  assert [program._cache_size() for program in programs] == after


def test_a_layer_is_better_after_the_fit_than_at_its_start():
  for found in fit_all():
    assert found.report.best_loss < found.report.start_loss
    changed = jax.tree.map(
      lambda x, y: bool((x != y).any()), found.start, found.variables
    )
    assert any(jax.tree.leaves(changed))


CHANGES = {
  "steps=30, not 31": {"steps": 31},
  r"window=\[1, 2\], not None": {"window": None},
  "num_heavy=1, not 2": {"num_heavy": 2},
  r"rng=\[0, 3\], not \[0, 4\]": {"rng": jax.random.key(4)},
  "num_heads=2, not 1": {"num_heads": 1},
  "num_features=6.*, not .*num_features=5": {
    "feature_map": sf.feature_map("prototypes", "none", num_features=5)
  },
}


def test_other_settings_are_refused(tmp_path):
  exact = {"window": (1, 2), "num_heavy": 1, "names": NAMES[:1]}
  before = fit_all(tmp_path, **exact)
  for message, change in CHANGES.items():
    with pytest.raises(ValueError, match=message) as error:
      fit_all(tmp_path, **exact | change)
    assert "layer_0.npz" in str(error.value)
    assert "\n" not in str(error.value)
  after = fit_all(tmp_path, **exact | {"steps": 5, "overwrite": True})
  assert len(after[0].report.losses) == 5 < len(before[0].report.losses)
  assert_same(fit_all(tmp_path, **exact | {"steps": 5}), after)


def test_other_data_are_refused(tmp_path):
  fit_all(tmp_path, names=NAMES[:1], steps=0)
  changed = layer(NAMES[0])
  changed = dataclasses.replace(changed, key=changed.key + 1.0)
  with pytest.raises(ValueError, match="was fitted with data="):
    fit_all(tmp_path, names=NAMES[:1], inputs=[changed], steps=0)


def test_a_file_holds_its_settings_and_the_layer(tmp_path):
  (found,) = fit_all(tmp_path, names=NAMES[:1])
  settings, stored = layer_files.load_layer(
    layer_files.path_of(tmp_path, NAMES[0])
  )
  assert_same([stored], [found])
  assert settings["data"] == layer(NAMES[0]).fingerprint
  assert settings["steps"] == 30 and settings["loss"] == "cross_entropy"
  assert settings["num_heads"] == HEADS


def test_another_file_is_no_layer(tmp_path):
  path = layer_files.path_of(tmp_path, NAMES[0])
  path.parent.mkdir(parents=True)
  for content in (b"", b"PK\x03\x04", b"text"):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="layer_0.npz' is not the file of a"):
      fit_all(tmp_path, names=NAMES[:1])


@pytest.mark.slow
def test_one_map_of_all_heads():
  (found,) = fit_all(names=NAMES[:1], num_heads=1)
  leaves = jax.tree.leaves(found.variables)
  assert {leaf.shape[0] for leaf in leaves} == {1}
  assert leaves[0].shape[-1] in (6, HEAD_DIM)
  assert found.report.best_loss < found.report.start_loss


def test_a_map_without_parameters_is_certified_as_it_is():
  fm = sf.feature_map("posrf", "orf", num_features=8)
  (found,) = fit_all(names=NAMES[:1], feature_map=fm, steps=0)
  assert found.report.best_step == 0
  assert found.variables.params == {}
