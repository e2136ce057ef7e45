"""Batches padded to the next bucket."""

import json

import jax
import numpy as np
import pytest

from spectraformer_jax import nn
from spectraformer_jax.data import Batches, Dataset
from spectraformer_jax.data.batches import epoch_order
from spectraformer_jax.feature_maps.compose import feature_map
from tests.data.test_batches import assert_equal, identities, take

BUCKETS = (2, 4, 6)


def of(dataset, global_batch=4, **options):
  arguments = dict(seed=0, train=True, buckets=BUCKETS) | options
  return Batches(dataset, global_batch, **arguments)


def widths(batches):
  return [batch["tokens"].shape[1] for batch in batches]


def test_a_batch_is_as_wide_as_its_longest_bucket(make_toy):
  batches = of(make_toy(200))
  epoch = take(batches, batches.steps_per_epoch)
  assert batches.padded_lengths == [2, 4, 6, 9] and batches.length == 9
  assert set(widths(epoch)) == {2, 4, 6, 9}
  for batch in epoch:
    width = batch["tokens"].shape[1]
    assert (
      batches.padded_lengths[np.searchsorted(batches.padded_lengths, width)]
      == width
    )
    longest = batch["length"].max()
    # The narrowest that holds it.
    assert width == min(x for x in batches.padded_lengths if x >= longest)
  mixed = [b for b in epoch if np.ptp(np.searchsorted(BUCKETS, b["length"]))]
  # Leftovers go up: at most one batch between two buckets mixes them.
  assert len(mixed) <= len(BUCKETS)


@pytest.mark.parametrize("count", [200, 203, 5])
def test_an_epoch_has_the_examples_it_has_without_buckets(make_toy, count):
  toy = make_toy(count)
  batches, plain = of(toy), of(toy, buckets=())
  assert batches.steps_per_epoch == plain.steps_per_epoch
  for _ in range(3):
    ours, theirs = (
      [i for b in take(x, x.steps_per_epoch) for i in identities(b)]
      for x in (batches, plain)
    )
    assert sorted(ours) == sorted(theirs) and len(set(ours)) == len(ours)
    assert ours != theirs or count == 5


def test_order_of_batches_is_shuffled_and_decided_by_seed_and_epoch(make_toy):
  toy = make_toy(200)
  steps = of(toy).steps_per_epoch
  epochs = [take(of(toy, seed=s), 2 * steps) for s in (0, 0, 1)]
  for one, two in zip(*epochs[:2], strict=True):
    assert_equal(one, two)
  kinds = [widths(epochs[0][:steps]), widths(epochs[0][steps:])]
  kinds.append(widths(epochs[2][:steps]))
  assert kinds[0] != kinds[1] and kinds[0] != kinds[2]
  # As many of each width, but not from short to long.
  assert all(sorted(kind) != kind for kind in kinds)
  # Within a bucket the order is that of the epoch.
  order = epoch_order(200, 0, 0) + 1
  lengths = np.diff(toy.offsets)
  shortest = [i for i in order.tolist() if lengths[i - 1] <= 2]
  rows = {tuple(identities(b)) for b in epochs[0][:steps]}
  assert tuple(shortest[:4]) in rows


@pytest.mark.parametrize("count", [1, 8, 23])
@pytest.mark.parametrize("hosts", [1, 4])
def test_evaluation_counts_every_example_once(make_toy, count, hosts):
  toy = make_toy(count)
  counted, shapes = [], []
  for host in range(hosts):
    batches = of(toy, 8, train=False, host=host, hosts=hosts)
    whole = list(batches)
    shapes.append(widths(whole))
    for batch in whole:
      assert batch["length"].min() >= 1
      assert batch["length"].max() <= batch["tokens"].shape[1]
      counted += np.array(identities(batch))[batch["weight"] == 1].tolist()
  assert sorted(counted) == list(range(1, count + 1))
  # Hosts must run the same program at the same time.
  assert all(shape == shapes[0] for shape in shapes)
  assert shapes[0] == sorted(shapes[0])


def test_hosts_share_one_global_order(make_toy):
  toy = make_toy(60)
  whole = take(of(toy, 8), 12)
  parts = [take(of(toy, 8, host=h, hosts=2), 12) for h in range(2)]
  for step, batch in enumerate(whole):
    joined = {
      name: np.concatenate([part[step][name] for part in parts])
      for name in batch
    }
    assert_equal(batch, joined)


@pytest.mark.parametrize("train", [True, False])
def test_resume_equals_the_uninterrupted_run(make_toy, train):
  toy = make_toy()
  reference = take(of(toy, 5, train=train), 11)
  batches = of(toy, 5, train=train)
  for step in range(len(reference) + 1):
    state = json.loads(json.dumps(batches.state()))
    resumed = of(toy, 5, train=train, state=state)
    rest = take(resumed, len(reference) - step)
    for expected, got in zip(reference[step:], rest, strict=True):
      assert_equal(expected, got)
    next(batches, None)


def test_resume_refuses_other_buckets(make_toy):
  toy = make_toy()
  state = of(toy).state()
  for buckets in ((), (2, 4)):
    with pytest.raises(ValueError, match=r"from buckets=.*got buckets=\[2, 4"):
      of(toy, buckets=buckets, state=state)


def test_the_longer_sequence_of_a_pair_decides():
  data = Dataset.from_sequences(
    [[1], [2, 2], [3] * 5, [4]],
    [0, 1, 0, 1],
    [[1], [2], [3], [4] * 5],
    **dict(name="pairs", vocab_size=9, num_classes=2, length=6),
  )
  batches = list(of(data, 2, train=False, buckets=(2,)))
  assert [b["label"].tolist() for b in batches] == [[0, 1], [0, 1]]
  for batch, width in zip(batches, (2, 6), strict=True):
    assert batch["tokens"].shape == batch["tokens_2"].shape == (2, width)


def test_buckets_are_rounded_up_like_the_length(make_toy):
  batches = of(make_toy(length=2000), pad_to_multiple=128, buckets=(700, 1024))
  assert batches.padded_lengths == [768, 1024, 2048]


@pytest.mark.parametrize(
  ("buckets", "message"),
  [
    ((4, 2), r"buckets must rise and lie below .* 9, .* got \(4, 2\)"),
    ((4, 4), "buckets must rise"),
    ((4, 9), "buckets must rise and lie below the padded length 9"),
    ((0, 4), "buckets must be an integer >= 1, got 0"),
    (("a",), "buckets must be an integer >= 1, got 'a'"),
  ],
)
def test_bad_buckets(make_toy, buckets, message):
  with pytest.raises(ValueError, match=message):
    of(make_toy(), buckets=buckets)


@pytest.mark.slow
def test_logits_do_not_depend_on_the_bucket(make_toy):
  toy = make_toy(16)
  model = nn.Classifier(
    vocab_size=256,
    num_classes=3,
    max_len=9,
    embed_dim=16,
    num_layers=1,
    num_heads=2,
    head_dim=8,
    mlp_dim=16,
    feature_map=feature_map("oprf", "orf", num_features=16),
  )
  keys = {"params": jax.random.key(0), "features": jax.random.key(1)}
  apply, variables, logits = jax.jit(model.apply), None, []
  for buckets in ((), (4,)):
    rows = {}
    for batch in of(toy, 4, train=False, buckets=buckets):
      inputs = batch["tokens"], batch["length"]
      variables = variables or model.init(keys, *inputs)
      out = apply(variables, *inputs)
      rows |= dict(zip(identities(batch), np.asarray(out), strict=True))
    logits.append(np.stack([rows[i] for i in sorted(rows)]))
  # float32 sums over other numbers of zeros.
  np.testing.assert_allclose(*logits, rtol=0, atol=1e-5)
  assert np.ptp(logits[0], axis=0).min() > 1e-3
