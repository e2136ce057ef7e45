"""Models of other people: what they attend to, recorded, and maps put in."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import spectraformer_jax as sf
from spectraformer_jax import linearize, nn
from spectraformer_jax.linearize.__main__ import main
from spectraformer_jax.study.approximation.capture import capture
from spectraformer_jax.study.approximation.inputs import ARRAYS

WIDTH, HEADS, LENGTH, BATCH = 8, 2, 6, 5
LAYERS = ("layer_0", "layer_1")


class Ours(linen.Module):
  """Two layers of attention of this library."""

  @linen.compact
  def __call__(self, x, mask):
    for name in LAYERS:
      layer = nn.SpectralSelfAttention(
        num_heads=HEADS, head_dim=4, attention="softmax", name=name
      )
      x = x + layer(x, mask)
    return x


class Theirs(linen.Module):
  """The same layers of Flax; parameters have the same names and shapes."""

  attention_fn: object = linen.dot_product_attention

  @linen.compact
  def __call__(self, x, mask=None):
    for name in LAYERS:
      x = x + linen.MultiHeadDotProductAttention(
        num_heads=HEADS, attention_fn=self.attention_fn, name=name
      )(x, mask=mask)
    return x


class TheirsNnx(nnx.Module):
  """The same layers of NNX."""

  def __init__(self, attention_fn):
    self.layers = nnx.List(
      [
        nnx.MultiHeadAttention(
          num_heads=HEADS,
          in_features=WIDTH,
          decode=False,
          attention_fn=attention_fn,
          rngs=nnx.Rngs(0),
        )
        for _ in LAYERS
      ]
    )

  def __call__(self, x, mask=None):
    for layer in self.layers:
      x = x + layer(x, mask=mask)
    return x

  def take(self, params):
    """Takes the parameters of a Linen model."""
    for layer, name in zip(self.layers, LAYERS, strict=True):
      for part in ("query", "key", "value", "out"):
        for leaf, value in params[name][part].items():
          getattr(getattr(layer, part), leaf)[...] = value
    return self


@pytest.fixture(scope="module")
def inputs():
  """Sequences, which positions are real, and their mask for Flax."""
  x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
  real = jnp.arange(LENGTH)[None] < jnp.array([[6], [4], [6], [2], [5]])
  return x, real, linen.make_attention_mask(real, real)


@pytest.fixture(scope="module")
def params(inputs):
  return Theirs().init(jax.random.key(1), inputs[0])["params"]


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_recorded_arrays_are_the_captured_ones(kind, inputs, params):
  x, real, mask = inputs
  layers, fn = linearize.recording_attention_fn()
  if kind == "linen":
    out = Theirs(fn).apply({"params": params}, x, mask)
  else:
    out = TheirsNnx(fn).take(params)(x, mask)
  ours = capture(Ours(), {"params": params}, x, real)
  assert [layer.name for layer in layers] == list(LAYERS)
  for theirs, expected in zip(layers, ours, strict=True):
    for name in ARRAYS:
      found, wanted = (getattr(y, name) for y in (theirs, expected))
      at_real = np.asarray(real)[:, :, None, None]
      if found.ndim == 4:  # what is padding differs, and does not count
        found, wanted = found * at_real, wanted * at_real
      np.testing.assert_allclose(found, wanted, atol=1e-5, err_msg=name)
  expected = Theirs().apply({"params": params}, x, mask)
  np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.fixture(scope="module")
def folder(inputs, params, tmp_path_factory):
  """What the command makes of the recorded arrays."""
  x, _, mask = inputs
  layers, fn = linearize.recording_attention_fn()
  Theirs(fn).apply({"params": params}, x, mask)
  path = tmp_path_factory.mktemp("theirs")
  linearize.write_npz(path / "layers.npz", layers)
  flags = ["--num_features=6", "--steps=2", f"--out={path / 'out'}"]
  assert main([f"--inputs={path / 'layers.npz'}", *flags]) == 0
  return path / "out"


@pytest.mark.slow
def test_fitted_layers_go_into_both_kinds_of_models(folder, inputs, params):
  x, real, mask = inputs
  functions = linearize.load(folder)
  first, second = functions
  assert first != second
  fn = linearize.in_order(functions)
  model = Theirs(fn)

  @jax.jit
  def apply(x):
    with fn:
      return model.apply({"params": params}, x, mask)

  out = apply(x)
  other = TheirsNnx(fn).take(params)
  with fn:
    np.testing.assert_allclose(other(x, mask), out, atol=1e-5)
  # Layer by layer, by hand.
  y = x
  for name, function in zip(LAYERS, functions, strict=True):
    layer = linen.MultiHeadDotProductAttention(
      num_heads=HEADS, attention_fn=function
    )
    y = y + layer.apply({"params": params[name]}, y, mask=mask)
  np.testing.assert_allclose(out, y, atol=1e-5)
  exact = Theirs().apply({"params": params}, x, mask)
  assert np.abs(out - exact)[real].max() > 1e-4


class Scanned(linen.Module):
  """Two layers in one scan."""

  attention_fn: object

  @linen.compact
  def __call__(self, x):
    class Layer(linen.Module):
      attention_fn: object

      @linen.compact
      def __call__(self, x, _):
        layer = linen.MultiHeadDotProductAttention(
          num_heads=HEADS, attention_fn=self.attention_fn
        )
        return x + layer(x), None

    scanned = linen.scan(
      Layer,
      variable_axes={"params": 0},
      split_rngs={"params": True},
      length=len(LAYERS),
    )
    return scanned(self.attention_fn)(x, None)[0]


def test_a_scan_over_layers_is_refused(inputs):
  x, _, _ = inputs
  plain = Scanned(linen.dot_product_attention)
  variables = plain.init(jax.random.key(0), x)
  _, record = linearize.recording_attention_fn()
  with pytest.raises(ValueError, match="layer_0 is called inside a transf"):
    Scanned(record).apply(variables, x)
  fn = linearize.in_order([linen.dot_product_attention] * len(LAYERS))
  with pytest.raises(ValueError, match="nn.scan"), fn:
    Scanned(fn).apply(variables, x)


def test_calls_are_counted(inputs, params):
  x, _, _ = inputs
  fn = linearize.in_order([linen.dot_product_attention] * 3)
  with pytest.raises(ValueError, match="got 2 calls for 3 layers"), fn:
    Theirs(fn).apply({"params": params}, x)
  fn = linearize.in_order([linen.dot_product_attention])
  with pytest.raises(ValueError, match="got call 2 for 1 layers"), fn:
    Theirs(fn).apply({"params": params}, x)
  with pytest.raises(ValueError, match="inside `with`"):
    Theirs(fn).apply({"params": params}, x)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"bias": jnp.zeros((1, 1, 3, 3))}, "a bias cannot be copied"),
    ({"dropout_rate": 0.1}, "dropout_rate=0.1 of attention weights"),
    ({"mask": jnp.tril(jnp.ones((3, 3)))}, "use recording_attention_fn.is_ca"),
    ({"mask": 1 - jnp.eye(3)}, "it hides single pairs"),
    (
      {"mask": jnp.array([True, False])[None, :, None, None]},
      "the same for all heads",
    ),
  ],
)
def test_what_cannot_be_recorded(options, message):
  x = jnp.ones((1, 3, 2, 4))
  layers, fn = linearize.recording_attention_fn()
  with pytest.raises(ValueError, match=message):
    fn(x, x, x, **options)
  assert not layers


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_dropout_of_a_model_is_seen(kind, inputs):
  """Flax passes only arguments that the function's signature names."""
  x, _, _ = inputs
  _, fn = linearize.recording_attention_fn()
  options = {"num_heads": HEADS, "dropout_rate": 0.5, "attention_fn": fn}
  with pytest.raises(ValueError, match="dropout_rate=0.5"):
    if kind == "linen":
      model = linen.MultiHeadDotProductAttention(**options)
      rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
      model.init(rngs, x, deterministic=False)
    else:
      nnx.MultiHeadAttention(
        in_features=WIDTH, decode=False, rngs=nnx.Rngs(0), **options
      )(x, deterministic=False)


def test_grouped_queries_keep_their_key_heads():
  rngs = jax.random.split(jax.random.key(0), 2)
  query = jax.random.normal(rngs[0], (2, 4, 6, 4))
  key, value = jax.random.normal(rngs[1], (2, 2, 4, 3, 4))
  layers, fn = linearize.recording_attention_fn()
  out = fn(query, key, value)
  assert (layers[0].query.shape[2], layers[0].key.shape[2]) == (6, 3)
  expected = sf.exact_attention(query, key, value, kernel="softmax")
  np.testing.assert_allclose(out, expected, atol=1e-5)


def test_causal_models():
  x = jax.random.normal(jax.random.key(0), (2, 4, 2, 4))
  real = jnp.array([[True] * 4, [True, True, False, False]])
  mask = linen.combine_masks(
    linen.make_attention_mask(real, real), linen.make_causal_mask(x[..., 0, 0])
  )
  layers, fn = linearize.recording_attention_fn(is_causal=True)
  fn(x, x, x, mask=mask)
  fn(x, x, x, is_causal=True)
  np.testing.assert_array_equal(layers[0].key_mask, real)
  assert layers[1].key_mask.all()
  with pytest.raises(ValueError, match="and later keys; it hides"):
    fn(x, x, x)


def test_folders_that_hold_no_conversion(tmp_path):
  with pytest.raises(ValueError, match="holds no conversion"):
    linearize.load(tmp_path)
  (tmp_path / "linearize.json").write_text("{")
  with pytest.raises(ValueError, match="is damaged"):
    linearize.load(tmp_path)
