"""Signals that end a run after the current step, with its state saved."""

import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

# If a launcher passes Ctrl-C on, a run gets SIGINT twice at the same moment. A
# person presses Ctrl-C again only some time after the first one.
AGAIN_AFTER_SECONDS = 1.0


class StopSignals:
  """Records SIGTERM and SIGINT instead of ending the run; a context manager.

  At its end it raises KeyboardInterrupt if a signal was received. A second
  SIGINT, more than `AGAIN_AFTER_SECONDS` later, raises it at once. Outside of
  the main thread, where Python allows no handlers, it does nothing. With
  several processes, a signal to one of them stops all after the same step:
  JAX's preemption service, which handles SIGTERM itself, tells the others.

  Attributes:
    received: name of the first signal; None if none was received.
  """

  def __init__(self) -> None:
    self.received: str | None = None
    self._since = 0.0
    self._previous: dict[int, Any] = {}

  def stop_after(self, step: int) -> bool:
    """Whether to stop after this step; call it after every step."""
    if jax.process_count() > 1:
      if multihost_utils.reached_preemption_sync_point(step):
        self.received = self.received or "SIGTERM"
        return True
      return False
    return self.received is not None

  def __enter__(self) -> "StopSignals":
    if threading.current_thread() is threading.main_thread():
      numbers = [signal.SIGINT]
      if jax.process_count() == 1:  # with several, JAX handles SIGTERM
        numbers.append(signal.SIGTERM)
      for number in numbers:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc_info: object) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    if self.received and exc_info[0] is None:
      raise KeyboardInterrupt(self.received)

  def _handle(self, number: int, frame: object) -> None:
    del frame
    now = time.monotonic()
    if self.received is None:
      self.received, self._since = signal.Signals(number).name, now
      if jax.process_count() > 1:
        os.kill(os.getpid(), signal.SIGTERM)  # stops the other processes
    elif number == signal.SIGINT and now > self._since + AGAIN_AFTER_SECONDS:
      raise KeyboardInterrupt
