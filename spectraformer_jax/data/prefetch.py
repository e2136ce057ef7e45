"""Prepares batches in a background thread."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from spectraformer_jax.data.batches import Batch, Batches

_POLL_SECONDS = 0.1


class Prefetch(Iterator[Batch]):
  """Keeps the next batches ready.

  Same batches, same order and same :meth:`state` as the iterator inside, which
  must not be used by anybody else any more. Use it in a ``with`` block, or call
  :meth:`close`; if neither happens the thread ends once this object is gone.

  Args:
    batches: the iterator to run ahead of.

  Example:
    >>> from spectraformer_jax.data import Dataset
    >>> toy = Dataset.from_sequences(
    ...   [[1], [2]], [0, 1], name="toy", vocab_size=5, num_classes=2, length=1)
    >>> with Prefetch(Batches(toy, 1, seed=0, train=False)) as ahead:
    ...   first = next(ahead)
    ...   ahead.state()["step"]
    1
  """

  def __init__(self, batches: Batches):
    self._state = batches.state()
    self._ready: queue.Queue = queue.Queue(maxsize=2)
    self._stop = threading.Event()
    self._end: BaseException | None = None
    # The thread must not hold `self`, or it would never be collected.
    self._thread = threading.Thread(
      target=_produce,
      args=(batches, self._ready, self._stop),
      name="prefetch",
      daemon=True,
    )
    weakref.finalize(self, self._stop.set)
    self._thread.start()

  def state(self) -> dict[str, Any]:
    """The state after the batch returned last, see :meth:`Batches.state`."""
    return dict(self._state)

  def __next__(self) -> Batch:
    """The next batch; raises what the iterator inside raised."""
    if self._end is None:
      item = self._ready.get()
      if isinstance(item, BaseException):
        self._end = item
      else:
        batch, self._state = item
        return batch
    raise self._end

  def close(self) -> None:
    """Ends the thread and waits for it; the iterator is then exhausted."""
    self._stop.set()
    self._thread.join()
    self._end = self._end or StopIteration()

  def __enter__(self) -> "Prefetch":
    return self

  def __exit__(self, *exception) -> None:
    self.close()


def _produce(
  batches: Batches, ready: queue.Queue, stop: threading.Event
) -> None:
  """Fills the queue with (batch, state) until the end, an error or `stop`."""
  while not stop.is_set():
    try:
      item = next(batches), batches.state()
    except BaseException as error:  # handed to the consumer, whatever it is
      item = error
    while not stop.is_set():
      try:
        ready.put(item, timeout=_POLL_SECONDS)
        break
      except queue.Full:
        pass
    if isinstance(item, BaseException):
      return
