import itertools
import json

import numpy as np
import pytest

from spectraformer_jax.data import Batches, Dataset
from spectraformer_jax.data.batches import epoch_order


def assert_equal(first, second):
  assert first.keys() == second.keys()
  for name in first:
    assert first[name].dtype == second[name].dtype
    np.testing.assert_array_equal(first[name], second[name])


def take(batches, count):
  return list(itertools.islice(batches, count))


def identities(batch):
  """The last token of each row, which numbers the examples of `make_toy`."""
  rows = np.arange(len(batch["length"]))
  return batch["tokens"][rows, batch["length"] - 1].tolist()


def test_rows_are_the_examples_padded_on_the_right(make_toy):
  toy = make_toy()
  batch = next(Batches(toy, 4, seed=0, train=False))
  assert batch["tokens"].shape == (4, 9)
  kinds = {name: array.dtype.name for name, array in batch.items()}
  assert kinds == {
    "tokens": "uint8",
    "length": "int32",
    "label": "int32",
    "weight": "float32",
  }
  for i in range(4):
    tokens, length = toy[i]["tokens"], batch["length"][i]
    assert length == len(tokens)
    assert batch["tokens"][i, :length].tolist() == tokens.tolist()
    assert not batch["tokens"][i, length:].any()
    assert batch["label"][i] == toy[i]["label"]


def test_bytes_get_257_ids_and_zero_is_padding_alone():
  data = Dataset.from_sequences(
    [[0, 255], [7]],
    [0, 1],
    [[0], [255, 1]],
    **dict(name="b", vocab_size=257, num_classes=2, length=3, id_shift=1),
  )
  batch = next(Batches(data, 2, seed=0, train=False))
  assert batch["tokens"].dtype == np.uint16
  assert batch["tokens"].tolist() == [[1, 256, 0], [8, 0, 0]]
  assert batch["length"].tolist() == [2, 1]
  assert batch["tokens_2"].tolist() == [[1, 0, 0], [256, 2, 0]]
  assert batch["length_2"].tolist() == [1, 2]


def test_padding_to_a_multiple(make_toy):
  def width(length, multiple):
    toy = make_toy(length=length)
    batches = Batches(toy, 2, seed=0, train=True, pad_to_multiple=multiple)
    shape = next(batches)["tokens"].shape
    assert shape == (2, batches.length)
    return batches.length

  assert width(2000, 128) == 2048
  assert width(2048, 128) == 2048
  assert width(2000, 1) == 2000


def test_an_epoch_is_a_permutation_and_the_next_another(make_toy):
  batches = Batches(make_toy(24), 4, seed=0, train=True)
  assert batches.steps_per_epoch == 6
  first, second = (
    [i for b in take(batches, 6) for i in identities(b)] for _ in range(2)
  )
  assert sorted(first) == sorted(second) == list(range(1, 25))
  assert first != second
  other = Batches(make_toy(24), 4, seed=1, train=True)
  assert [i for b in take(other, 6) for i in identities(b)] != first


def test_order_is_fixed_for_ever():
  # Words of Philox 4x64 with this key; equal in every version of numpy.
  assert epoch_order(8, seed=3, epoch=2).tolist() == [2, 4, 1, 3, 6, 5, 0, 7]


def test_training_drops_the_incomplete_batch(make_toy):
  batches = Batches(make_toy(23), 5, seed=0, train=True)
  assert batches.steps_per_epoch == 4
  epoch = [i for b in take(batches, 4) for i in identities(b)]
  assert len(set(epoch)) == 20
  assert batches.state()["epoch"] == 1 and batches.state()["step"] == 0
  assert all((b["weight"] == 1).all() for b in take(batches, 9))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 23])
@pytest.mark.parametrize("hosts", [1, 4])
def test_evaluation_counts_every_example_once(make_toy, count, hosts):
  toy = make_toy(count)
  counted = []
  for host in range(hosts):
    batches = Batches(toy, 8, seed=0, train=False, host=host, hosts=hosts)
    for batch in batches:
      assert batch["tokens"].shape == (8 // hosts, 9)
      # Filler rows must be valid input: an empty row would give a NaN mean.
      assert batch["length"].min() >= 1
      counted += np.array(identities(batch))[batch["weight"] == 1].tolist()
    with pytest.raises(StopIteration):
      next(batches)
  assert sorted(counted) == list(range(1, count + 1))


def test_weight_of_the_last_evaluation_batch(make_toy):
  batches = list(Batches(make_toy(10), 4, seed=0, train=False))
  assert [b["weight"].tolist() for b in batches] == [
    [1, 1, 1, 1],
    [1, 1, 1, 1],
    [1, 1, 0, 0],
  ]
  assert identities(batches[-1]) == [9, 10, 10, 10]


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_one_global_order(make_toy, train, hosts):
  toy = make_toy()
  whole = take(Batches(toy, 8, seed=5, train=train), 5)
  parts = [
    take(Batches(toy, 8, seed=5, train=train, host=h, hosts=hosts), 5)
    for h in range(hosts)
  ]
  for step, batch in enumerate(whole):
    joined = {
      name: np.concatenate([part[step][name] for part in parts])
      for name in batch
    }
    assert_equal(batch, joined)


@pytest.mark.parametrize("train", [True, False])
def test_resume_equals_the_uninterrupted_run(make_toy, train):
  toy = make_toy()
  reference = take(Batches(toy, 5, seed=2, train=train), 11)
  assert len(reference) == (11 if train else 5)
  batches = Batches(toy, 5, seed=2, train=train)
  for step in range(len(reference) + 1):
    state = json.loads(json.dumps(batches.state()))
    resumed = Batches(toy, 5, seed=2, train=train, state=state)
    assert resumed.state() == state
    rest = take(resumed, len(reference) - step)
    assert len(rest) == len(reference) - step
    for expected, got in zip(reference[step:], rest, strict=True):
      assert_equal(expected, got)
    next(batches, None)


def test_state_is_the_same_on_every_host(make_toy):
  toy = make_toy()
  states = []
  for host in range(2):
    batches = Batches(toy, 4, seed=0, train=True, host=host, hosts=2)
    take(batches, 7)
    states.append(batches.state())
  assert states[0] == states[1]
  assert (states[0]["epoch"], states[0]["step"]) == (1, 2)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(global_batch=0), "global_batch must be an integer >= 1, got 0"),
    (dict(global_batch=24), "at most the 23 training examples, got 24"),
    (dict(hosts=3), "global_batch must be a multiple of hosts=3, got 4"),
    (dict(hosts=0), "hosts must be an integer >= 1, got 0"),
    (dict(host=2, hosts=2), "host must be below hosts=2, got 2"),
    (dict(host=-1), "host must be an integer >= 0, got -1"),
    (dict(seed=-1), "seed must be an integer >= 0, got -1"),
    (dict(seed=2**64), r"seed must be below 2\*\*64, got 18446744073709551616"),
    (dict(pad_to_multiple=0), "pad_to_multiple must be an integer >= 1, got 0"),
  ],
)
def test_bad_arguments_are_refused(make_toy, options, message):
  arguments = dict(global_batch=4, seed=0, train=True) | options
  with pytest.raises(ValueError, match=message):
    Batches(make_toy(), **arguments)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      dict(fingerprint="0"),
      "must come from fingerprint='.*got fingerprint='0'",
    ),
    (dict(fingerprint=None), "must come from fingerprint="),
    (dict(seed=1), "must come from seed=0 of dataset 'toy', got seed=1"),
    (dict(global_batch=8), "come from global_batch=4 .* got global_batch=8"),
    (dict(step=5), "state must have step <= 4"),
    (dict(step=-1), r"state\['step'\] must be an integer >= 0, got -1"),
    (dict(epoch="x"), r"state\['epoch'\] must be an integer >= 0, got 'x'"),
  ],
)
def test_resume_refuses_a_state_of_something_else(make_toy, change, message):
  toy = make_toy()
  state = Batches(toy, 4, seed=0, train=True).state() | change
  with pytest.raises(ValueError, match=message) as caught:
    Batches(toy, 4, seed=0, train=True, state=state)
  assert "\n" not in str(caught.value)


def test_resume_refuses_other_data_and_later_epochs_of_evaluation(make_toy):
  state = Batches(make_toy(), 4, seed=0, train=True).state()
  with pytest.raises(ValueError, match="fingerprint"):
    Batches(make_toy(seed=1), 4, seed=0, train=True, state=state)
  with pytest.raises(ValueError, match="epoch 0 unless train, got epoch=1"):
    Batches(make_toy(), 4, seed=0, train=False, state=state | {"epoch": 1})
