import dataclasses

import numpy as np
import pytest

from spectraformer_jax.study.approximation.inputs import (
  make_inputs,
  random_inputs,
  read_npz,
  write_npz,
)


@pytest.fixture
def toy():
  return random_inputs(batch=2, length=8, num_heads=2, head_dim=4, seed=0)


def test_random_inputs_follow_the_seed(toy):
  again = random_inputs(batch=2, length=8, num_heads=2, head_dim=4, seed=0)
  other = random_inputs(batch=2, length=8, num_heads=2, head_dim=4, seed=1)
  assert toy.fingerprint == again.fingerprint != other.fingerprint


def test_fingerprint_sees_masks(toy):
  mask = toy.key_mask.copy()
  mask[0, -1] = False
  masked = dataclasses.replace(toy, key_mask=mask)
  assert masked.fingerprint != toy.fingerprint


def test_layers_of_a_file(toy, tmp_path):
  path = tmp_path / "layers.npz"
  names = ("layer_10", "layer_9")
  write_npz(path, [dataclasses.replace(toy, name=name) for name in names])
  layers = read_npz(path)
  assert [layer.name for layer in layers] == ["layer_9", "layer_10"]
  assert layers[0].fingerprint == toy.fingerprint


def test_one_layer_with_short_names(tmp_path):
  x = np.ones((1, 4, 1, 2), np.float16)
  np.savez(tmp_path / "mine.npz", q=x, k=2 * x, v=3 * x)
  (layer,) = read_npz(tmp_path / "mine.npz")
  assert layer.name == "mine"
  assert (layer.query[0, 0, 0, 0], layer.value[0, 0, 0, 0]) == (1.0, 3.0)
  assert layer.key_mask.all() and layer.key.dtype == np.float32


@pytest.mark.parametrize(
  ("arrays", "message"),
  [
    ({"q": np.ones((1, 4, 1, 2))}, "has no key, value"),
    ({"x": np.ones(3)}, "arrays are called"),
    (
      {n: np.ones((1, 4, 1, 2 + (n == "k"))) for n in "qkv"},
      "'f'.*must share head_dim",
    ),
    ({n: np.full((1, 4, 1, 2), np.nan) for n in "qkv"}, "not finite"),
    ({n: np.ones((1, 4, 2 if n == "q" else 1, 2)) for n in "qkv"}, "repeat"),
    ({n: np.array(["a"]) for n in "qkv"}, "inputs 'f': could not convert"),
    ({}, "holds no arrays"),
  ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path, arrays, message):
  np.savez(tmp_path / "f.npz", **arrays)
  with pytest.raises(ValueError, match=message):
    read_npz(tmp_path / "f.npz")


@pytest.mark.parametrize("content", [b"no zip", b""])
def test_other_files_are_refused(tmp_path, content):
  (tmp_path / "f.npz").write_bytes(content)
  with pytest.raises(ValueError, match="is not an npz file"):
    read_npz(tmp_path / "f.npz")


def test_a_single_array_is_refused(tmp_path):
  np.save(tmp_path / "f.npy", np.ones((1, 4, 1, 2)))
  with pytest.raises(ValueError, match="is not an npz file of arrays"):
    read_npz(tmp_path / "f.npy")


def test_pickled_arrays_are_refused(tmp_path):
  np.savez(tmp_path / "f.npz", q=np.array([{}], dtype=object))
  with pytest.raises(ValueError, match="is not an npz file of arrays"):
    read_npz(tmp_path / "f.npz")


def test_cropping(toy):
  assert toy.cropped(5).query.shape == (2, 5, 2, 4)
  assert toy.cropped(5).key_mask.shape == (2, 5)
  assert toy.cropped(None) is toy
  with pytest.raises(ValueError, match="have 8 positions, got --lengths 9"):
    toy.cropped(9)
  cross = make_inputs("cross", toy.query[:, :3], toy.key, toy.value)
  assert cross.cropped(None).query.shape[1] == 3
  with pytest.raises(ValueError, match="3 queries and 8 keys"):
    cross.cropped(3)


def test_queries_take_the_mask_of_keys():
  x, mask = np.ones((1, 4, 1, 2)), np.array([[True, True, False, False]])
  inputs = make_inputs("toy", x, x, x, mask)
  assert (inputs.query_mask == mask).all()
  with pytest.raises(ValueError, match="hides a whole sequence"):
    make_inputs("toy", x, x, x, np.zeros((1, 4), bool))
