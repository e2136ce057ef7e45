"""A JAX profiler trace of some training steps."""

from pathlib import Path

import jax

from spectraformer_jax.typing import PyTree


class Profiler:
  """Traces steps into a folder; a context manager.

  The trace begins after the first step of the process, which is slower since
  memory and caches are cold, and ends after `num_steps` more, or with the run.

  Args:
    folder: gets plugins/profile/<time>/ with files for TensorBoard's profile
      plugin and ui.perfetto.dev.
    num_steps: number of steps to trace; 0 for none.
  """

  def __init__(self, folder: Path, num_steps: int) -> None:
    self._folder = folder
    self._num_steps = num_steps
    self._first: int | None = None
    self._is_on = False

  def step(self, done: int, result: PyTree) -> str | None:
    """Starts or ends the trace after a step that was dispatched.

    Args:
      done: number of the step.
      result: arrays of the step; the trace starts and ends once they are
        computed.

    Returns:
      A line to show when the trace is written; None otherwise.
    """
    if not self._num_steps:
      return None
    if self._first is None:
      jax.block_until_ready(result)
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._first, self._is_on = done + 1, True
    elif self._is_on and done == self._first + self._num_steps - 1:
      jax.block_until_ready(result)
      self._stop()
      return f"profile: steps {self._first} to {done} are in {self._folder}"
    return None

  def _stop(self) -> None:
    self._is_on = False
    jax.profiler.stop_trace()

  def __enter__(self) -> "Profiler":
    return self

  def __exit__(self, *exc_info: object) -> None:
    if self._is_on:
      self._stop()
