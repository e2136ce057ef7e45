"""Masked and causal objectives, and runs that start from such a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spectraformer_jax.train.config import default_config, validate
from spectraformer_jax.train.devices import parallel
from spectraformer_jax.train.loop import train_and_evaluate
from spectraformer_jax.train.pretrained import start_from
from spectraformer_jax.train.run.writers import read_rows
from spectraformer_jax.train.step import objectives
from spectraformer_jax.train.step.state import run_keys
from tests.train import workers
from tests.train.helpers import (
  finished_folder,
  first_state,
  same_arrays,
  saved_arrays,
  without_times,
)

SHORT = {"train.num_steps": 32, "eval.every": 16, "checkpoint.every": 12}
MASKED = SHORT | {"train.objective": "masked"}
MASK = 99


def batch(rows=400, longest=40):
  length = jax.random.randint(jax.random.key(0), (rows,), 1, longest + 1)
  tokens = jax.random.randint(jax.random.key(1), (rows, longest), 0, 50)
  weight = jnp.where(jnp.arange(rows) < rows - 3, 1.0, 0.0)
  return {
    "tokens": tokens.astype(jnp.uint8),
    "length": length,
    "weight": weight,
    "label": length,
  }


@pytest.mark.parametrize("rng", [None, 5])
def test_masked_tokens_are_hidden_and_asked_and_no_others(rng):
  given = batch()
  key = None if rng is None else jax.random.key(rng)
  made = objectives.with_token_labels("masked", MASK, given, key)
  hidden = made["tokens"] == MASK
  is_token = jnp.arange(40)[None] < given["length"][:, None]
  assert not bool(jnp.any(hidden & ~is_token))
  np.testing.assert_array_equal(
    jnp.where(hidden, given["tokens"], made["tokens"]), given["tokens"]
  )
  np.testing.assert_array_equal(made["label"], given["tokens"])
  weighted = is_token & (given["weight"] > 0)[:, None]
  np.testing.assert_array_equal(made["weight"] > 0, hidden & weighted)
  # Of 8000 tokens; 5 standard deviations.
  share = float(hidden.sum() / is_token.sum())
  assert abs(share - 1 / 7) < 0.02
  any_asked = jnp.any(hidden, axis=1)
  np.testing.assert_allclose(
    made["weight"].sum(1), jnp.where(any_asked, given["weight"], 0), rtol=1e-6
  )
  if rng is None:
    assert bool(jnp.all(any_asked))


def test_what_is_hidden_does_not_depend_on_padding_in_evaluation():
  given = batch(rows=20)
  longer = given | {"tokens": jnp.pad(given["tokens"], ((0, 0), (0, 9)))}
  make = lambda given: objectives.with_token_labels("masked", MASK, given, None)
  np.testing.assert_array_equal(
    make(longer)["weight"][:, :40], make(given)["weight"]
  )


def test_causal_asks_for_the_next_token():
  given = batch(rows=20)
  made = objectives.with_token_labels("causal", MASK, given, jax.random.key(0))
  np.testing.assert_array_equal(made["tokens"], given["tokens"])
  for row in range(20):
    length = int(given["length"][row])
    asked = np.flatnonzero(np.asarray(made["weight"][row]))
    if row < 17:
      assert asked.tolist() == list(range(length - 1))
    else:
      assert asked.size == 0
    np.testing.assert_array_equal(
      made["label"][row, : length - 1], given["tokens"][row, 1:length]
    )


def test_pairs_are_two_rows_of_half_the_weight():
  given = batch(rows=10)
  pair = given | {
    "tokens_2": given["tokens"][::-1],
    "length_2": given["length"][::-1],
  }
  one = objectives.with_token_labels("masked", MASK, given, None)
  both = objectives.with_token_labels("masked", MASK, pair, None)
  np.testing.assert_array_equal(both["tokens"][:10], one["tokens"])
  np.testing.assert_array_equal(both["tokens"][10:], one["tokens"][::-1])
  np.testing.assert_allclose(both["weight"][:10], one["weight"] / 2)


def test_each_step_hides_others():
  seen = []

  def step(state, batch, rng, *, axis_name):
    seen.append(batch["tokens"])

  learn = objectives.for_objective(step, objective="masked", mask_token=MASK)
  state = lambda number: type("State", (), {"step": jnp.int32(number)})
  rng = run_keys(0).dropout_rng
  for number in (0, 0, 1):
    learn(state(number), batch(), rng)
  np.testing.assert_array_equal(seen[0], seen[1])
  assert bool(jnp.any(seen[0] != seen[2]))


def test_an_unknown_objective_is_refused():
  config = default_config()
  config.train.objective = "maskd"
  with pytest.raises(ValueError, match="one of classify, masked, causal"):
    validate(config)


@pytest.fixture(scope="module")
def pretrained(tiny_config, tmp_path_factory):
  """A finished masked run: workdir, result."""
  workdir = tmp_path_factory.mktemp("pretrained")
  return workdir, train_and_evaluate(tiny_config(**MASKED), workdir)


@pytest.mark.slow
def test_pretraining_learns_tokens(pretrained):
  workdir, result = pretrained
  rows = [row for row in read_rows(workdir) if "train/loss" in row]
  assert rows[-1]["train/loss"] < 0.8 * rows[0]["train/loss"]
  assert result["baselines"] == {}
  report = (workdir / "report.md").read_text()
  assert "masked: accuracy is that of guessed tokens" in report


@pytest.mark.slow
def test_pretraining_resumes_bit_for_bit(
  pretrained, tiny_config, tmp_path, monkeypatch
):
  with monkeypatch.context() as patch:
    patch.setattr(parallel.DataParallelStep, "__call__", workers.stopping(23))
    with pytest.raises(KeyboardInterrupt):
      train_and_evaluate(tiny_config(**MASKED), tmp_path)
  train_and_evaluate(tiny_config(**MASKED), tmp_path)
  workdir, _ = pretrained
  same_arrays(saved_arrays(tmp_path, 32), saved_arrays(workdir, 32))
  assert without_times(read_rows(tmp_path)) == without_times(read_rows(workdir))


@pytest.mark.slow
def test_finetuning_starts_from_the_pretrained_weights(
  pretrained, tiny_config, tmp_path
):
  # A step of rate 0 in all but name: what it saves is what it started from.
  changes = {
    "model.init_from": str(pretrained[0]),
    "model.pooling": "cls",
    "model.pooled_norm": "batch",
    "train.num_steps": 1,
    "optim.warmup_steps": 0,
    "optim.lr": 1e-30,
  }
  train_and_evaluate(tiny_config(**changes), tmp_path)
  best = pretrained[1]["best_step"]
  source = saved_arrays(pretrained[0], best)
  found = saved_arrays(tmp_path, 1)
  shared = [
    name
    for name in found
    if name.startswith(
      (
        "['params']['encoder']",
        "['params']['token_embedding']",
        "['params']['position_embedding']",
        "['collections']['random_features']",
      )
    )
  ]
  assert len(shared) == 21
  for name in shared:
    rows = len(found[name])
    np.testing.assert_array_equal(found[name], source[name][:rows], name)


@pytest.mark.parametrize(
  ("changes", "words"),
  [
    ({"model.mlp": "gated"}, "config.model.mlp is 'gelu' there and 'gated'"),
    ({"feature_map.num_features": 8}, "num_features is 16 there and 8 here"),
    ({"model.max_len": 70}, "max_len"),
    ({"model.init_from": "/nowhere"}, "finished run, got '/nowhere'"),
  ],
)
@pytest.mark.quick_every(4)
def test_other_weights_are_refused(
  changes, words, pretrained, tiny_config, tmp_path
):
  changes = {"model.init_from": str(pretrained[0])} | changes
  with pytest.raises(ValueError, match=words):
    train_and_evaluate(tiny_config(**changes), tmp_path)


SOFTMAX = {"model.attention": "softmax"}
# Learnable rows, and running statistics.
LEARNT = {
  "feature_map.weight_matrix": "fastfood_learnable",
  "feature_map.component_kwargs": {"statistics": "ema"},
}


@pytest.mark.parametrize(
  ("there", "here", "head"),
  [
    (SOFTMAX, {}, True),
    (SOFTMAX, LEARNT, True),
    (SOFTMAX | {"train.objective": "masked"}, {}, False),
    ({}, SOFTMAX, True),
    ({"model.attention": "linformer"}, LEARNT, True),
  ],
)
@pytest.mark.quick_every(5)
def test_weights_of_a_run_with_another_attention(
  there, here, head, tiny_config, tmp_path
):
  folder = tmp_path / "there"
  source = workers.named("", finished_folder(folder, tiny_config(**there)))
  config = tiny_config(**here, **{"model.init_from": str(folder)})
  before = workers.named("", first_state(config))
  new, lines = start_from(first_state(config), config)
  after = workers.named("", new)
  assert after.keys() == before.keys()
  taken = set()
  for name in before:
    own = "feature_map" in name or not name.startswith(".params")
    is_head = "head" in name
    if own or (is_head and not head) or name not in source:
      np.testing.assert_array_equal(after[name], before[name], name)
      continue
    if "token_embedding" in name:
      rows = len(before[name])
      np.testing.assert_array_equal(after[name], source[name][:rows], name)
    else:
      np.testing.assert_array_equal(after[name], source[name], name)
    taken.add(name)
  assert any("token_embedding" in name for name in taken)
  assert any("encoder" in name and "kernel" in name for name in taken)
  assert any("head" in name for name in taken) == head
  text = "\n".join(lines)
  assert str(folder) in text and "taken: encoder/" in text
  assert ("head" in lines[0]) == head
  if here != SOFTMAX:
    assert "random_features" in lines[1] and "initialised: " in lines[1]
  if there == {}:
    assert "random_features" in lines[-1] and "left out: " in lines[-1]


def test_what_another_attention_does_not_excuse(tiny_config, tmp_path):
  folder = tmp_path / "there"
  finished_folder(folder, tiny_config(**SOFTMAX))
  changes = {"model.mlp": "gated", "model.init_from": str(folder)}
  config = tiny_config(**changes)
  with pytest.raises(ValueError, match="config.model.mlp is 'gelu' there"):
    start_from(first_state(config), config)
