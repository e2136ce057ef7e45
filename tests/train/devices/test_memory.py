"""Accumulation, rematerialisation, bfloat16: less memory, the same training."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.ad_checkpoint import print_saved_residuals

from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.train.run.writers import read_rows
from spectraformer_jax.train.step import state, steps
from tests.train import workers

TX = optax.sgd(1.0)


def gradients(model, **options):
  """Gradients and sums of the tiny batch."""
  train_state = state.create(model, workers.MAP, TX, state.run_keys(0))
  find = functools.partial(steps.gradients, apply_fn=model.apply, **options)
  grads, sums, _ = jax.jit(find)(
    train_state, workers.tiny_batch(), jax.random.key(1)
  )
  return workers.named("", grads), np.asarray(sums)


def relative_error(found, expected):
  """Of all gradients together."""
  norm = lambda tree: np.sqrt(sum(np.sum(np.square(x)) for x in tree.values()))
  assert found.keys() == expected.keys()
  difference = {name: found[name] - expected[name] for name in found}
  return norm(difference) / norm(expected)


@pytest.fixture(scope="module")
def plain():
  return gradients(workers.tiny_model())


def test_accumulated_gradient_is_that_of_the_whole_batch(plain):
  # The weights of the four parts differ, so a mean of their means would not do.
  weights = workers.tiny_batch()["weight"].reshape(4, -1).sum(axis=1)
  assert weights.min() < 0.7 * weights.max()
  grads, sums = gradients(workers.tiny_model(), accumulate=4)
  np.testing.assert_allclose(sums, plain[1], rtol=1e-6)
  # float32 in another order: 1.1e-6 with jax 0.12.
  assert relative_error(grads, plain[0]) < 2e-6


def test_accumulation_sums_over_replicas_once():
  model = workers.tiny_model()
  train_state = state.create(model, workers.MAP, TX, state.run_keys(0))
  step = functools.partial(
    steps.train_step,
    apply_fn=model.apply,
    tx=TX,
    accumulate=4,
    axis_name="data",
  )
  traced = jax.make_jaxpr(step, axis_env=[("data", 2)])(
    train_state, workers.tiny_batch(), jax.random.key(1)
  )
  names = [eqn.primitive.name for eqn in traced.jaxpr.eqns]
  assert "scan" in names and "psum" in names
  loop = traced.jaxpr.eqns[names.index("scan")]
  assert "psum" not in str(loop.params["jaxpr"])


def test_parts_have_their_own_dropout():
  batch = {name: array[:4] for name, array in workers.tiny_batch(3).items()}
  # The second half repeats the first, with weight in one of them at a time.
  batch = {name: np.concatenate([a, a]) for name, a in batch.items()}
  model = workers.tiny_model(dropout_rate=0.5)
  train_state = state.create(model, workers.MAP, TX, state.run_keys(0))
  find = jax.jit(
    functools.partial(steps.gradients, apply_fn=model.apply, accumulate=2)
  )
  losses = []
  for half in (0, 1):
    weight = np.zeros(8, np.float32)
    weight[4 * half : 4 * half + 4] = 1
    _, sums, _ = find(
      train_state, batch | {"weight": weight}, jax.random.key(1)
    )
    losses.append(float(sums.loss))
  assert losses[0] != losses[1]


@pytest.mark.slow
def test_remat_gives_the_same_gradient():
  model = workers.tiny_model(dropout_rate=0.5)
  expected, sums = gradients(model)
  grads, sums_again = gradients(model.clone(remat=True))
  # The same dropout; compiled in another way.
  np.testing.assert_allclose(sums_again, sums, rtol=1e-6)
  assert relative_error(grads, expected) < 1e-6


@pytest.mark.slow
def test_remat_keeps_less_for_the_backward_pass(capsys):
  # What is kept, not the compiler's plan: XLA's for CPU is hardly smaller.
  def kept(remat):
    model = workers.tiny_model().clone(remat=remat)
    train_state = state.create(model, workers.MAP, TX, state.run_keys(0))
    inputs = steps.model_inputs(workers.tiny_batch())

    def loss(params):
      return jnp.sum(
        model.apply({"params": params, **train_state.collections}, *inputs)
      )

    print_saved_residuals(loss, train_state.params)
    lines = capsys.readouterr().out.splitlines()
    shapes = [
      re.match(r"\w+\[([\d,]*)\]", line)
      for line in lines
      if "from the argument" not in line
    ]
    assert all(shapes) and shapes
    return sum(
      np.prod([int(n) for n in shape[1].split(",") if n], dtype=int)
      for shape in shapes
    )

  with_remat, without = kept(True), kept(False)
  assert with_remat < 0.5 * without, (with_remat, without)


def test_memory_plan():
  model = workers.tiny_model()
  train_state = state.create(model, workers.MAP, TX, state.run_keys(0))
  step = parallel.DataParallelStep(
    functools.partial(steps.eval_step, apply_fn=model.apply)
  )
  assert step.memory_plan() is None
  step.compile(parallel.replicate(train_state), workers.tiny_batch())
  plan = step.memory_plan()
  arrays = sum(leaf.nbytes for leaf in jax.tree.leaves(train_state.params))
  assert plan["arguments"] > arrays
  assert plan["total"] >= plan["arguments"] + plan["temporary"]
  assert plan["temporary"] > 0 and step.compile_seconds > 0


@pytest.mark.parametrize("engine", parallel.ENGINES)
def test_plan_has_no_buffers_of_loops_to_come(engine):
  # Eight loops, each of which writes what the one before has left into a buffer
  # of its own: four are in use at a time. XLA's usual order makes all nine at
  # first.
  def step(scale, batch, *, axis_name):
    x = batch["x"] * scale
    for _ in range(8):
      write = lambda i, whole, x=x: whole.at[:, i].set(jnp.sin(x[:, i]))
      x = jax.lax.fori_loop(0, x.shape[1], write, jnp.zeros_like(x))
    return jax.lax.pmean(jnp.sum(x), axis_name)

  mapped = parallel.DataParallelStep(step, engine=engine)
  batch = {"x": np.ones((jax.device_count(), 16, 4096), np.float32)}
  mapped.compile(parallel.replicate(jnp.float32(1)), batch)
  buffers = mapped.memory_plan()["temporary"] / (16 * 4096 * 4)
  assert buffers < 5, buffers


@pytest.mark.slow
def test_bfloat16_gradient_is_close(plain):
  model = workers.tiny_model().clone(dtype=jnp.bfloat16)
  train_state = state.create(model, workers.MAP, TX, state.run_keys(0))
  for leaf in jax.tree.leaves((train_state.params, train_state.opt_state)):
    assert leaf.dtype == jnp.float32
  grads, sums = gradients(model)
  assert {grad.dtype for grad in grads.values()} == {np.dtype(np.float32)}
  # 0.052 was found: eight bits of mantissa, through two layers of width 8 and
  # back. Not float32, or it would be below 1e-6.
  assert 1e-3 < relative_error(grads, plain[0]) < 0.1
  np.testing.assert_allclose(sums[0], plain[1][0], rtol=1e-2)


@pytest.mark.slow
def test_all_of_them_train(tiny_config, tmp_path):
  config = tiny_config(
    **{
      "train.precision": "bfloat16",
      "train.accumulate": 2,
      "train.remat": True,
      "train.num_steps": 32,
    }
  )
  train_and_evaluate(config, tmp_path)
  losses = [r["train/loss"] for r in read_rows(tmp_path) if "train/loss" in r]
  assert losses[-1] < 0.93 * losses[0]


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"train.accumulate": 5}, "accumulate = 5, got 32"),
    ({"train.precision": "float16"}, "one of float32, bfloat16, got 'float16'"),
  ],
)
def test_mistakes(changes, message, tiny_config, tmp_path):
  with pytest.raises(ValueError, match=message):
    train_and_evaluate(tiny_config(**changes), tmp_path)
