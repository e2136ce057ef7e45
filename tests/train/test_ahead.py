"""The step is compiled once, before the first step, and says what it needs."""

import functools
import logging

import jax
import optax
import pytest
from absl import logging as absl_logging

from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.train.step import state, steps
from tests.train import workers

COMPILED = "/jax/core/compile/backend_compile_duration"


@pytest.fixture
def compilations():
  """Grows by one for every program that XLA compiles."""
  events = []

  def listen(name, seconds, **_):
    if name == COMPILED:
      events.append(seconds)

  jax.monitoring.register_event_duration_secs_listener(listen)
  yield events
  jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("engine", parallel.ENGINES)
@pytest.mark.quick_every(2)
def test_compiled_once_and_ahead(engine, compilations):
  model, tx = workers.tiny_model(0.1), optax.adam(1e-3)
  train_state = parallel.replicate(
    state.create(model, workers.MAP, tx, state.run_keys(0))
  )
  rng = parallel.replicate(jax.random.key(1))
  step = parallel.DataParallelStep(
    functools.partial(steps.train_step, apply_fn=model.apply, tx=tx),
    engine=engine,
    donate_state=True,
  )
  before = len(compilations)
  step.compile(train_state, workers.tiny_batch(), rng)
  assert len(compilations) == before + 1
  assert step.memory_plan()["total"] > 0
  for seed in range(4):
    train_state, sums = step(train_state, workers.tiny_batch(seed), rng)
  jax.block_until_ready(sums)
  assert len(compilations) == before + 1


@pytest.mark.slow
def test_plan_comes_before_the_first_step(
  tiny_config, tmp_path, monkeypatch, caplog, compilations
):
  absl_logging.set_verbosity(absl_logging.INFO)
  counts, lines = {}, {}

  def look(number, batch):
    counts[number] = len(compilations)
    lines[number] = list(caplog.messages)

  for number in (1, 2, 7):
    monkeypatch.setattr(
      parallel.DataParallelStep,
      "__call__",
      workers.before_step(number, functools.partial(look, number)),
    )
  config = tiny_config(**{"train.num_steps": 8, "eval.every": 8})
  with caplog.at_level(logging.INFO, logger="absl"):
    train_and_evaluate(config, tmp_path)
  (plan,) = [m for m in lines[1] if m.startswith("memory of a step")]
  assert "MiB arguments" in plan and "MiB temporary" in plan
  assert sum(m.startswith("memory of a step") for m in caplog.messages) == 1
  # Of anything at all, after the second step: rows are written in between.
  assert counts[1] <= counts[2] == counts[7]
  # The table of parts as well.
  (head,) = [n for n, m in enumerate(lines[1]) if m.startswith("part ")]
  table = dict(line.split(maxsplit=1) for line in lines[1][head + 1 : head + 8])
  assert table["head_logits"].split() == ["170", "0"]
  assert table["encoder/layer_0"].split()[1] == str(2 * 16 * 8)
