"""Makes numpy batches, in an order that depends on (seed, epoch) only."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from spectraformer_jax.data.dataset import Dataset
from spectraformer_jax.registry import check_int
from spectraformer_jax.seeds import check_seed

Batch = dict[str, np.ndarray]


class _Plan(NamedTuple):
  """The order of an epoch's examples, and the padded length of each batch."""

  order: np.ndarray
  lengths: np.ndarray


class Batches(Iterator[Batch]):
  """Iterates over a dataset in batches of one shape, or one shape per bucket.

  A batch holds, for b = global_batch / hosts rows:

  * ``tokens`` [b, length]: ids, padded with 0 on the right; uint8, or uint16
    where the vocabulary needs it. Only ``length`` tells which are padding,
    since 0 may also be the id of a token.
  * ``length`` [b] int32: number of tokens of each row, without padding.
  * ``tokens_2``, ``length_2``: the second sequence, for pairs.
  * ``label`` [b] int32.
  * ``weight`` [b] float32: 1, or 0 for a row that only completes the last
    batch. Such a row repeats the last example, so that it is valid input.

  Training never ends: each epoch has a new order and drops the incomplete
  batch at its end. Evaluation is one pass in the order of the dataset, which
  counts every example once.

  With `buckets`, a batch holds examples of similar lengths and is padded to the
  next bucket. Examples that do not fill a batch of their bucket move to the
  next longer one, so an epoch has as many batches and examples as without
  buckets. The order still depends on (seed, epoch) only; evaluation goes from
  short examples to long ones.

  Host h of H gets rows ``[h b, (h + 1) b)`` of every global batch, so the
  global order does not depend on the number of hosts, nor does the state.

  Args:
    dataset: the examples.
    global_batch: number of rows over all hosts; a multiple of `hosts`.
    seed: seed of the order, below 2**64; unused in evaluation.
    train: True for endless, shuffled epochs; False for one pass in order.
    host: this host's index.
    hosts: number of hosts.
    state: position to resume from, as :meth:`state` returns it; None: start.
    pad_to_multiple: the padded length is ``dataset.length`` rounded up to a
      multiple of this.
    buckets: padded lengths below the full one, in rising order; each is rounded
      up likewise. The longer sequence of a pair decides its bucket.

  Raises:
    ValueError: if a number is out of range, a training batch is larger than the
      dataset, or the state belongs to other data, batch size, seed or buckets.

  Example:
    >>> toy = Dataset.from_sequences(
    ...   [[1, 2], [3], [4]], [0, 1, 0], name="toy", vocab_size=5,
    ...   num_classes=2, length=4)
    >>> for batch in Batches(toy, 2, seed=0, train=False):
    ...   print(batch["length"], batch["label"], batch["weight"])
    [2 1] [0 1] [1. 1.]
    [1 1] [0 0] [1. 0.]
  """

  def __init__(
    self,
    dataset: Dataset,
    global_batch: int,
    *,
    seed: int,
    train: bool,
    host: int = 0,
    hosts: int = 1,
    state: Mapping[str, Any] | None = None,
    pad_to_multiple: int = 1,
    buckets: Sequence[int] = (),
  ) -> None:
    self.dataset = dataset
    self.global_batch = check_int("global_batch", global_batch, 1)
    self.seed = check_seed("seed", seed)
    self.train = train
    self._host = check_int("host", host, 0)
    hosts = check_int("hosts", hosts, 1)
    if self._host >= hosts:
      raise ValueError(f"host must be below hosts={hosts}, got {host}.")
    if global_batch % hosts:
      raise ValueError(
        f"global_batch must be a multiple of hosts={hosts}, got {global_batch}."
      )
    if train and global_batch > len(dataset):
      raise ValueError(
        f"global_batch must be at most the {len(dataset)} training examples, "
        f"got {global_batch}."
      )
    self._rows = global_batch // hosts
    multiple = check_int("pad_to_multiple", pad_to_multiple, 1)
    self.length = -(-dataset.length // multiple) * multiple
    self.padded_lengths = _padded_lengths(buckets, self.length, multiple)
    rounded = len(dataset) if train else len(dataset) + global_batch - 1
    self.steps_per_epoch = rounded // global_batch
    self._epoch, self._step = 0, 0
    self._plan: _Plan | None = None
    self._plan_epoch = -1
    if state is not None:
      self._restore(state)

  def state(self) -> dict[str, Any]:
    """Returns the position after the last returned batch, as json values.

    ``epoch`` and ``step`` (number of returned batches of the epoch) are the
    position; ``seed``, ``global_batch``, ``buckets`` and ``fingerprint`` are
    compared on resuming.
    """
    return {"epoch": self._epoch, "step": self._step} | self._identity()

  def __next__(self) -> Batch:
    if self._step == self.steps_per_epoch:
      raise StopIteration
    if self._plan is None or self._plan_epoch != self._epoch:
      self._plan, self._plan_epoch = self._make_plan(), self._epoch
    first = self._step * self.global_batch + self._host * self._rows
    ranks = np.arange(first, first + self._rows)
    last = len(self.dataset) - 1
    indices = self._plan.order[np.minimum(ranks, last)]
    batch = self._gather(indices, int(self._plan.lengths[self._step]))
    batch["weight"] = (ranks <= last).astype(np.float32)
    self._step += 1
    if self.train and self._step == self.steps_per_epoch:
      self._epoch, self._step = self._epoch + 1, 0
    return batch

  def _make_plan(self) -> "_Plan":
    """Returns the plan of the current epoch."""
    size, steps = self.global_batch, self.steps_per_epoch
    order = np.arange(len(self.dataset))
    if self.train:
      order = epoch_order(len(order), self.seed, self._epoch)[: steps * size]
    if len(self.padded_lengths) == 1:
      return _Plan(order, np.full(steps, self.length))
    lengths_by_name = [
      np.diff(offsets) for _, _, offsets in self.dataset.sequences()
    ]
    longest = np.max(lengths_by_name, axis=0)
    bucket = np.searchsorted(self.padded_lengths, longest[order])
    # Sorts by bucket, so that a batch that a bucket cannot fill continues with
    # the next longer bucket, whose length it gets.
    by_bucket = np.argsort(bucket, kind="stable")
    order, bucket = order[by_bucket], bucket[by_bucket]
    ends = np.minimum(np.arange(1, steps + 1) * size, len(order)) - 1
    lengths = np.asarray(self.padded_lengths)[bucket[ends]]
    if self.train:
      # The order of the batches needs random words of its own: those of epochs
      # below 2**63 order the examples.
      shuffled = epoch_order(steps, self.seed, 2**63 + self._epoch)
      order = order.reshape(steps, size)[shuffled].ravel()
      lengths = lengths[shuffled]
    return _Plan(order, lengths)

  def _gather(self, indices: np.ndarray, width: int) -> Batch:
    """Returns the examples at `indices`, padded to `width` tokens."""
    batch = {}
    for name, tokens, offsets in self.dataset.sequences():
      length_name = name.replace("tokens", "length")
      batch[name], batch[length_name] = self._pad(
        tokens, offsets, indices, width
      )
    return batch | {"label": self.dataset.labels[indices]}

  def _pad(
    self,
    tokens: np.ndarray,
    offsets: np.ndarray,
    indices: np.ndarray,
    width: int,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns ids ``[rows, width]`` and lengths ``[rows]``."""
    padded = np.zeros((len(indices), width), self.dataset.id_dtype)
    starts, ends = offsets[indices], offsets[indices + 1]
    lengths = (ends - starts).astype(np.int32)
    # Copies one slice per row: many times faster than indexing all at once.
    for row, start, end in zip(
      padded, starts.tolist(), ends.tolist(), strict=True
    ):
      row[: end - start] = tokens[start:end]
      if self.dataset.id_shift:
        row[: end - start] += self.dataset.id_dtype.type(self.dataset.id_shift)
    return padded, lengths

  def _identity(self) -> dict[str, Any]:
    """Returns the values in which a state must agree with its iterator."""
    return {
      "seed": self.seed,
      "global_batch": self.global_batch,
      "buckets": self.padded_lengths[:-1],
      "fingerprint": self.dataset.fingerprint,
    }

  def _restore(self, state: Mapping[str, Any]) -> None:
    """Goes to the position in `state`; raises ValueError if it does not fit."""
    for name, here in self._identity().items():
      if state.get(name) != here:
        raise ValueError(
          f"state must come from {name}={here!r} of dataset "
          f"{self.dataset.name!r}, got {name}={state.get(name)!r}; order and "
          "content would differ."
        )
    self._epoch = check_int("state['epoch']", state.get("epoch"), 0)
    self._step = check_int("state['step']", state.get("step"), 0)
    # A finished epoch of training counts as the start of the next one; only
    # evaluation can be at the end of its epoch.
    last_step = self.steps_per_epoch - (1 if self.train else 0)
    if self._step > last_step or (self._epoch and not self.train):
      raise ValueError(
        f"state must have step <= {last_step}, and epoch 0 unless train, got "
        f"epoch={self._epoch}, step={self._step} for train={self.train}."
      )


def _padded_lengths(
  buckets: Sequence[int], longest: int, multiple: int
) -> list[int]:
  """Returns the padded lengths that batches may have, in rising order."""
  lengths = [
    -(-check_int("buckets", bucket, 1) // multiple) * multiple
    for bucket in buckets
  ]
  lengths.append(longest)
  if any(a >= b for a, b in itertools.pairwise(lengths)):
    raise ValueError(
      f"buckets must rise and lie below the padded length {longest}, after "
      f"rounding up to multiples of {multiple}, got {tuple(buckets)}."
    )
  return lengths


def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
  """Returns the order of an epoch, which sorts Philox words for (seed, epoch).

  The algorithm Philox fixes these random words, so the order is the same in
  every version of numpy.

  Args:
    num_examples: number of examples.
    seed: below 2**64.
    epoch: below 2**64.

  Returns:
    A permutation of ``range(num_examples)``, int64.

  Example:
    >>> sorted(epoch_order(4, seed=0, epoch=1).tolist())
    [0, 1, 2, 3]
  """
  words = np.random.Philox(key=np.array([seed, epoch], np.uint64))
  return np.argsort(words.random_raw(num_examples), kind="stable")
