"""Being told to stop: a run ends after a step, with its state saved."""

import os
import signal
import threading
import time
from typing import Any

import jax
from jax.experimental import multihost_utils

# Ctrl-C reaches a run twice where a launcher passes it on; a person who means
# it presses again after having seen that the first one did not stop the run.
AGAIN_AFTER_SECONDS = 1.0


class StopSignals:
  """Notes SIGTERM and SIGINT instead of acting on them; a context manager.

  It leaves with a KeyboardInterrupt if one came. A second SIGINT raises it at
  once. Outside of the main thread, where Python allows no handlers, it does
  nothing. With several processes a signal to one of them stops all after the
  same step, by JAX's preemption service, which has the handler of SIGTERM.

  Attributes:
    received: the name of the first signal, None if there was none.
  """

  def __init__(self):
    self.received: str | None = None
    self._since = 0.0
    self._previous: dict[int, Any] = {}

  def stop_after(self, step: int) -> bool:
    """Whether to stop after this step; to be asked after every one."""
    if jax.process_count() > 1:
      if multihost_utils.reached_preemption_sync_point(step):
        self.received = self.received or "SIGTERM"
        return True
      return False
    return self.received is not None

  def __enter__(self) -> "StopSignals":
    if threading.current_thread() is threading.main_thread():
      alone = jax.process_count() == 1
      for number in (signal.SIGINT, signal.SIGTERM)[: 2 if alone else 1]:
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(self, *exc_info: Any) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    if self.received and exc_info[0] is None:
      raise KeyboardInterrupt(self.received)

  def _handle(self, number: int, frame: Any) -> None:
    del frame
    now = time.monotonic()
    if self.received is None:
      self.received, self._since = signal.Signals(number).name, now
      if jax.process_count() > 1:
        os.kill(os.getpid(), signal.SIGTERM)  # tells the others
    elif number == signal.SIGINT and now > self._since + AGAIN_AFTER_SECONDS:
      raise KeyboardInterrupt
