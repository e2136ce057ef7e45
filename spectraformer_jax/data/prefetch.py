"""Prepares batches in a background thread."""

import queue
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from spectraformer_jax.data.batches import Batch, Batches

_POLL_SECONDS = 0.1


class Prefetch(Iterator[Batch]):
  """Prepares the next batches in a thread.

  Returns the batches of the wrapped iterator in the same order, with the same
  :meth:`state`; only this object may use the wrapped iterator. Use this object
  in a ``with`` block, or call :meth:`close`; otherwise the thread ends when
  this object is garbage-collected.

  Args:
    batches: the wrapped iterator.

  Example:
    >>> from spectraformer_jax.data import Dataset
    >>> toy = Dataset.from_sequences(
    ...   [[1], [2]], [0, 1], name="toy", vocab_size=5, num_classes=2, length=1)
    >>> with Prefetch(Batches(toy, 1, seed=0, train=False)) as ahead:
    ...   first = next(ahead)
    ...   ahead.state()["step"]
    1
  """

  def __init__(self, batches: Batches) -> None:
    self._state = batches.state()
    self._ready: queue.Queue = queue.Queue(maxsize=2)
    self._stop = threading.Event()
    self._end: BaseException | None = None
    # The thread must not refer to `self`, or `self` would never be collected.
    self._thread = threading.Thread(
      target=_produce,
      args=(batches, self._ready, self._stop),
      name="prefetch",
      daemon=True,
    )
    weakref.finalize(self, self._stop.set)
    self._thread.start()

  def state(self) -> dict[str, Any]:
    """Returns the state after the last returned batch, see `Batches.state`."""
    return dict(self._state)

  def __next__(self) -> Batch:
    """Returns the next batch; raises the error of the wrapped iterator."""
    if self._end is None:
      item = self._ready.get()
      if isinstance(item, BaseException):
        self._end = item
      else:
        batch, self._state = item
        return batch
    raise self._end

  def close(self) -> None:
    """Stops the thread and waits for its end; no batch follows."""
    self._stop.set()
    self._thread.join()
    self._end = self._end or StopIteration()

  def __enter__(self) -> "Prefetch":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def _produce(
  batches: Batches, ready: queue.Queue, stop: threading.Event
) -> None:
  """Puts (batch, state) into the queue until the end, an error or `stop`."""
  while not stop.is_set():
    try:
      item = next(batches), batches.state()
    except BaseException as error:  # `Prefetch.__next__` raises it
      item = error
    while not stop.is_set():
      try:
        ready.put(item, timeout=_POLL_SECONDS)
        break
      except queue.Full:
        pass
    if isinstance(item, BaseException):
      return
