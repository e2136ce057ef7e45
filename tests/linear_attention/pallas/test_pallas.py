"""Pallas kernels, interpreted: values, gradients, races, refusals."""

import contextlib
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import spectraformer_jax as sf
from spectraformer_jax.linear_attention import for_platform, implementations
from spectraformer_jax.linear_attention.pallas import gpu, scan
from spectraformer_jax.linear_attention.pallas.implementation import Kernels

PLATFORMS = ("tpu", "gpu")
# One of two is enough from day to day: both share all but the loop.
ONE_QUICK = ("tpu", pytest.param("gpu", marks=pytest.mark.slow))
FAMILY = {
  "posrf": {},
  "oprf": {"statistics": "batch"},
  "saderf": {"statistics": "learned", "per_dimension": True},
  "aderf": {"statistics": "batch"},
}


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
  """Both implementations under names of their own, run on this machine."""
  for platform in PLATFORMS:
    kernels = Kernels(platform, interpret=True)
    add(monkeypatch, f"interpreted_{platform}", kernels)


def add(monkeypatch, name, kernels):
  """Makes an implementation known for one test."""
  implementation = implementations.Implementation(kernels.run, kernels.refuses)
  monkeypatch.setitem(implementations.IMPLEMENTATIONS, name, implementation)


@functools.cache
def build_map(component="posrf", num_heads=2, **kwargs):
  """A map with 16 features and its variables, for heads of 16."""
  options = FAMILY.get(component, {}) | kwargs
  fm = sf.feature_map(
    component, "orf", num_features=16, component_kwargs=options
  )
  variables = fm.init(jax.random.key(7), head_dim=16, num_heads=num_heads)
  return fm, variables


def draw_arrays(
  length, keys=None, heads=2, dtype=jnp.float32, value_dim=16, batch=2
):
  """Random query, key, value."""
  rngs = jax.random.split(jax.random.key(length), 3)
  shapes = (length, heads, 16), (keys or length, 2, 16), (keys or length, 2)
  query, key = (
    jax.random.normal(rng, (batch, *shape), dtype)
    for rng, shape in zip(rngs[:2], shapes[:2], strict=True)
  )
  return (
    query,
    key,
    jax.random.normal(rngs[2], (batch, *shapes[2], value_dim), dtype),
  )


def output_and_gradients(implementation, arrays, fm, variables, **kwargs):
  """Output, and gradients for query, key, value and learnable parameters."""

  @jax.jit
  def both(arrays, params):
    def loss(arrays, params):
      out = sf.spectral_attention(
        *arrays,
        feature_map=fm,
        variables=variables._replace(params=params),
        implementation=implementation,
        **kwargs,
      )
      weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32))
      return jnp.sum(out.astype(jnp.float32) * weights.reshape(out.shape)), out

    grads, out = jax.grad(loss, (0, 1), has_aux=True)(arrays, params)
    return out, grads

  return both(arrays, variables.params)


def assert_close(actual, expected, tolerance):
  """Same trees up to sums in another order."""
  for a, b in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(
      *(x.astype(jnp.float32) for x in (a, b)), rtol=tolerance, atol=tolerance
    )


def chunk_of(platform):
  """The smallest chunk the platform can do."""
  return {"tpu": 128, "gpu": 16}[platform]


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
  "chunks", [pytest.param(0.1, marks=pytest.mark.slow), 2.4]
)
@pytest.mark.quick_every(4)
def test_values_and_gradients_equal_the_reference(platform, is_causal, chunks):
  fm, variables = build_map()
  length = int(chunks * chunk_of(platform)) or 1
  arrays = draw_arrays(length)
  mask = jax.random.bernoulli(jax.random.key(1), 0.7, (2, length))
  kwargs = {"is_causal": is_causal, "key_mask": mask.at[:, 0].set(True)}
  actual = output_and_gradients(
    f"interpreted_{platform}",
    *(arrays, fm, variables),
    chunk_size=chunk_of(platform),
    **kwargs,
  )
  expected = output_and_gradients("reference", arrays, fm, variables, **kwargs)
  assert_close(actual, expected, 5e-5)


@pytest.mark.parametrize(
  ("component", "platform"),
  [
    ("saderf", "tpu"),
    ("aderf", "gpu"),
    pytest.param("oprf", "tpu", marks=pytest.mark.slow),
    pytest.param("saderf", "gpu", marks=pytest.mark.slow),
  ],
)
@pytest.mark.quick_every(2)
def test_components_of_the_family(component, platform):
  fm, variables = build_map(component)
  arrays = draw_arrays(40, keys=50)
  actual = output_and_gradients(
    f"interpreted_{platform}", arrays, fm, variables, chunk_size=16
  )
  expected = output_and_gradients("reference", arrays, fm, variables)
  if component == "saderf":
    grads = jax.tree.leaves(expected[1][1])
    assert grads and all(float(jnp.abs(g).min()) > 0 for g in grads)
  assert_close(actual, expected, 1e-4)


@pytest.mark.parametrize("platform", ONE_QUICK)
def test_bfloat16_inputs(platform):
  fm, variables = build_map(num_heads=1)
  arrays = draw_arrays(40, dtype=jnp.bfloat16)
  exact = tuple(a.astype(jnp.float32) for a in arrays)
  kwargs = {"is_causal": True}
  out, grads = output_and_gradients(
    f"interpreted_{platform}", arrays, fm, variables, **kwargs
  )
  expected = output_and_gradients("reference", exact, fm, variables, **kwargs)
  # One rounding to 8 bits of each result.
  as_bfloat16 = lambda tree: jax.tree.map(
    lambda a: a.astype(jnp.bfloat16), tree
  )
  assert_close([out], as_bfloat16([expected[0]]), 2.0**-6)
  assert_close(grads[0], as_bfloat16(expected[1][0]), 2.0**-6)


@pytest.mark.parametrize(
  ("num_heads", "is_causal"),
  [pytest.param(1, True, marks=pytest.mark.slow), (2, False)],
)
@pytest.mark.slow
def test_values_in_parts(num_heads, is_causal, monkeypatch):
  parts = []

  def fit(sizes, asked):
    parts.append(sizes.value_dim)
    return scan.Tile(16, sizes.value_dim // 4)

  monkeypatch.setattr(gpu, "fit", fit)
  fm, variables = build_map(num_heads=num_heads)
  arrays = draw_arrays(40)
  first, second = ([a[:, :20] for a in arrays], [a[:, 20:] for a in arrays])
  kwargs = {"feature_map": fm, "variables": variables, "return_state": True}

  def both(implementation):
    chosen = {"implementation": implementation}
    _, state = sf.spectral_attention(*first, **chosen, **kwargs)
    return sf.spectral_attention(
      *second, initial_state=state, is_causal=is_causal, **chosen, **kwargs
    )

  (out, state), (expected, after) = both("interpreted_gpu"), both("xla")
  means = lambda state: state.kv / state.total[..., None]
  assert_close((out, means(state)), (expected, means(after)), 5e-5)
  kwargs = {"is_causal": is_causal}
  actual = output_and_gradients(
    "interpreted_gpu", arrays, fm, variables, **kwargs
  )
  assert_close(
    actual, output_and_gradients("xla", arrays, fm, variables, **kwargs), 5e-5
  )
  assert set(parts) == {16}


@pytest.mark.parametrize(
  ("platform", "is_causal"),
  [
    ("tpu", False),
    pytest.param("gpu", True, marks=pytest.mark.slow),
    pytest.param("gpu", False, marks=pytest.mark.slow),
  ],
)
@pytest.mark.slow
def test_states_go_in_and_out(platform, is_causal):
  fm, variables = build_map("oprf", statistics="constant")
  first, second = draw_arrays(20), draw_arrays(36)

  @functools.partial(jax.jit, static_argnums=0)
  def both(implementation, first, second):
    def loss(first, second):
      kwargs = {
        "feature_map": fm,
        "variables": variables,
        "return_state": True,
        "implementation": implementation,
        "chunk_size": 16,
      }
      out, state = sf.spectral_attention(*first, is_causal=True, **kwargs)
      more, state = sf.spectral_attention(
        *second, is_causal=is_causal, initial_state=state, **kwargs
      )
      # Sums are of any size; their logarithms are not.
      return (
        jnp.sum(jnp.sin(out))
        + jnp.sum(jnp.cos(more))
        + jnp.sum(jnp.log(state.total)) / 100.0,
        (out, more, state.length),
      )

    return jax.grad(loss, (0, 1), has_aux=True)(first, second)

  actual = both(f"interpreted_{platform}", first, second)
  assert_close(actual, both("xla", first, second), 5e-5)


@pytest.mark.parametrize("platform", ONE_QUICK)
def test_what_padding_holds_does_not_matter(platform):
  fm, variables = build_map()
  query, key, value = draw_arrays(40)
  mask = jnp.arange(40)[None, :] < jnp.array([[23], [0]])
  outs = [
    output_and_gradients(
      f"interpreted_{platform}",
      (
        query,
        *(jnp.where(mask[:, :, None, None], a, fill) for a in (key, value)),
      ),
      fm,
      variables,
      key_mask=mask,
      is_causal=True,
    )
    for fill in (0.0, jnp.nan)
  ]
  jax.tree.map(np.testing.assert_array_equal, *outs)
  out, grads = outs[0]
  for array in (out, *grads[0]):
    np.testing.assert_array_equal(array[1], 0.0)
    assert bool(jnp.isfinite(array).all())


@pytest.mark.parametrize("platform", ONE_QUICK)
def test_the_future_changes_no_bit(platform):
  fm, variables = build_map()
  arrays = [4.0 * a for a in draw_arrays(300)]
  attend = functools.partial(
    sf.spectral_attention,
    feature_map=fm,
    variables=variables,
    is_causal=True,
    implementation=f"interpreted_{platform}",
    chunk_size=chunk_of(platform),
  )
  before = attend(*arrays)
  for changed in (299, 140, 128):
    after = attend(*(a.at[:, changed:].multiply(-1.7) for a in arrays))
    np.testing.assert_array_equal(after[:, :changed], before[:, :changed])
    assert float(jnp.abs(after - before).max()) > 0.0


@pytest.mark.parametrize(
  "is_causal", [pytest.param(False, marks=pytest.mark.slow), True]
)
@pytest.mark.slow
def test_no_races_and_nothing_out_of_bounds(is_causal, monkeypatch, capfd):
  checked = pltpu.InterpretParams(
    detect_races=True,
    num_cores_or_threads=2,
    out_of_bounds_reads="raise",
    uninitialized_memory="nan",
  )
  add(monkeypatch, "checked", Kernels("tpu", checked))
  fm, variables = build_map()
  arrays = draw_arrays(200, batch=1)
  mask = jnp.arange(200)[None] != 3
  kwargs = {"is_causal": is_causal, "key_mask": mask, "chunk_size": 128}
  actual = output_and_gradients("checked", arrays, fm, variables, **kwargs)
  assert_close(
    actual, output_and_gradients("xla", arrays, fm, variables, **kwargs), 5e-5
  )
  assert "RACE DETECTED" not in "".join(capfd.readouterr())


def attend(implementation, fm=None, arrays=None, **kwargs):
  """One call with small arrays."""
  fm, variables = fm or build_map()
  return sf.spectral_attention(
    *(arrays or draw_arrays(20)),
    feature_map=fm,
    variables=variables,
    implementation=implementation,
    **kwargs,
  )


@pytest.mark.parametrize("platform", PLATFORMS)
def test_what_cannot_run_is_refused_in_words(platform):
  name = f"interpreted_{platform}"
  refused = functools.partial(pytest.raises, ValueError)
  with refused(match=f"'{name}' cannot run: it takes no segment_ids"):
    attend(name, segment_ids=jnp.zeros((2, 20), jnp.int32))
  with refused(match="as many query heads as key heads"):
    attend(name, arrays=draw_arrays(20, heads=4))
  with refused(match="not query of type float16"):
    attend(name, arrays=draw_arrays(20, dtype=jnp.float16))
  with refused(match="positive feature maps"):
    attend(name, build_map("trigrf"))
  fm = sf.feature_map("relu", "orf", num_features=16)
  with refused(match="without a factor"):
    attend(name, (fm, fm.init(jax.random.key(0), head_dim=16)))
  with refused(match="no feature map to fuse"):
    sf.linear_attention(*draw_arrays(20), implementation=name)
  with refused(match=r"bytes of (VMEM|shared memory)"):
    big = jnp.zeros((1, 4096, 1, 128))
    fm = sf.feature_map("posrf", "orf", num_features=8192)
    attend(name, (fm, fm.init(jax.random.key(0), head_dim=128)), [big] * 3)


def test_sizes_that_triton_cannot_do():
  query, key, value = draw_arrays(20)
  with pytest.raises(
    ValueError, match="powers of two from 16.*'value_dim': 12"
  ):
    attend("interpreted_gpu", arrays=(query, key, value[..., :12]))


@pytest.mark.parametrize("platform", PLATFORMS)
def test_another_platform_is_refused_and_falls_back(platform):
  name = f"pallas_{platform}"
  message = f"{name}.*needs a {platform.upper()}, JAX runs on 'cpu'"
  with pytest.raises(ValueError, match=message):
    attend(name)
  np.testing.assert_array_equal(attend((name, "xla")), attend("xla"))
  both = "pallas_tpu.*; implementation 'pallas_gpu' cannot run"
  with pytest.raises(ValueError, match=both):
    attend(("pallas_tpu", "pallas_gpu"))


def test_kernels_of_a_backend_that_jax_removed_are_refused(monkeypatch):
  monkeypatch.delattr(sys.modules[gpu.__package__], "gpu")
  monkeypatch.setitem(sys.modules, gpu.__name__, None)
  add(monkeypatch, "removed", Kernels("gpu", interpret=True))
  with pytest.raises(ValueError, match="this version of JAX does not have"):
    attend("removed")


def test_kernels_are_off_by_default():
  assert implementations.names_of(None)[0] == "xla"
  assert {"pallas_tpu", "pallas_gpu"} <= set(implementations.IMPLEMENTATIONS)


@pytest.mark.parametrize("component", ["posrf_hyp", "asderf"])
@pytest.mark.parametrize("platform", PLATFORMS)
def test_kernels_lower_without_the_hardware(platform, component):
  options = (
    {"statistics": "constant"} if component in ("saderf", "asderf") else {}
  )
  fm = sf.feature_map(
    component, "orf", num_features=64, component_kwargs=options
  )
  variables = fm.init(jax.random.key(0), head_dim=32)
  x = jax.ShapeDtypeStruct((1, 512, 2, 32), jnp.bfloat16)

  def loss(*arrays):
    name = f"pallas_{platform}"
    out = attend(name, (fm, variables), arrays, is_causal=True)
    return jnp.sum(out.astype(jnp.float32))

  trace = jax.jit(jax.grad(loss, (0, 1, 2))).trace
  if platform == "gpu" and component == "posrf_hyp":
    match = r"cannot do \['concatenate'\]"
    with for_platform(platform), pytest.raises(ValueError, match=match):
      trace(x, x, x)
    return
  target, call = {
    "tpu": ("tpu", "tpu_custom_call"),
    "gpu": ("cuda", "triton"),
  }[platform]
  device = jax.sharding.AbstractDevice(
    device_kind="NVIDIA H100", num_cores=132, platform="gpu"
  )
  mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
  is_gpu = platform == "gpu"
  on_gpu = jax.sharding.use_abstract_mesh(mesh)
  with on_gpu if is_gpu else contextlib.nullcontext(), for_platform(platform):
    traced = trace(x, x, x)
    text = traced.lower(lowering_platforms=(target,)).as_text()
  assert text.count(call) >= 2
