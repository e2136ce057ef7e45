"""Times cases, each in its own process, alone or in turn; writes a CSV."""

import contextlib
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# The line by which a process asks its parent for a turn.
_TURN = "waits for its turn\n"


def measure_missing(
  module: str,
  path: str,
  cases: Sequence[dict],
  figures: Sequence[str],
  arguments: Sequence[str] = (),
  *,
  compared: str | None = None,
) -> list[dict]:
  """Measures the cases that the CSV lacks, under a progress bar.

  Args:
    module: runs as ``python -m module --one CASE ARGUMENTS``, and prints a JSON
      object with the figures in its last line.
    path: of the CSV; written row by row.
    cases: all with the same keys.
    figures: names of the measured figures.
    arguments: more flags for each process.
    compared: a key of cases. Cases that differ only in this key are timed in
      turn, a call of each at a time, since the speed of a machine may change by
      more than the cases differ; see `median_times`.

  Returns:
    Rows of the CSV, old and new. Cases that fail are printed and left out.
  """
  from rich.progress import Progress

  names = tuple(cases[0]) if cases else ()
  rows = read(path)
  is_new = not rows
  done = [{name: row[name] for name in names} for row in rows]
  missing = [case for case in cases if case not in done]
  python = (sys.executable, "-m", module)
  with Path(path).open("a") as file, Progress() as bar:
    writer = csv.writer(file)
    if is_new:
      writer.writerow([*names, *figures])
    task = bar.add_task(
      "measuring", total=len(cases), completed=len(cases) - len(missing)
    )
    for group in _groups(missing, compared):
      commands = [
        [*python, "--one", json.dumps(case), *arguments] for case in group
      ]
      for case, run in zip(group, _run_in_turn(commands), strict=True):
        if run.process.returncode:
          print(f"{case} failed:\n{run.errors[-500:]}", file=sys.stderr)
          continue
        row = case | json.loads(run.last)
        rows.append(row)
        writer.writerow([_cell(row[name]) for name in (*names, *figures)])
      file.flush()
      bar.advance(task, len(group))
  return rows


def _groups(cases: Sequence[dict], compared: str | None) -> list[list[dict]]:
  """Groups cases that differ only in `compared`; None: each case by itself."""
  groups = {}
  for case in cases:
    same = {key: value for key, value in case.items() if key != compared}
    groups.setdefault(json.dumps(same), []).append(case)
  return list(groups.values())


def _run_in_turn(commands: Sequence[list[str]]) -> list["_Run"]:
  """Runs all commands to their ends; those that ask for turns alternate."""
  runs, waiting = [], []
  with contextlib.ExitStack() as cleanup:
    for command in commands:
      runs.append(run := _Run(command))
      cleanup.callback(run.end)
      if run.until_turn():
        waiting.append(run)
    while waiting:
      waiting = [run for run in waiting if run.take_turn()]
  return runs


class _Run:
  """A process that may ask for turns: see `median_times`."""

  def __init__(self, command: list[str]):
    self._stderr = tempfile.TemporaryFile("w+")
    self.process = subprocess.Popen(
      command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=self._stderr,
      text=True,
    )
    self.last = self.errors = ""

  def until_turn(self) -> bool:
    """Waits for the process: True if it asks for a turn, False if it ends."""
    for line in self.process.stdout:
      if line == _TURN:
        return True
      self.last = line
    self.process.wait()
    return False

  def take_turn(self) -> bool:
    """Lets the process work for one turn, then waits like `until_turn`."""
    with contextlib.suppress(BrokenPipeError):  # it has died
      self.process.stdin.write("\n")
      self.process.stdin.flush()
    return self.until_turn()

  def end(self) -> None:
    """Kills the process if it still runs, and keeps its stderr."""
    self.process.kill()
    self.process.communicate()
    with self._stderr:
      self._stderr.seek(0)
      self.errors = self._stderr.read()


def use_cores(count: int) -> None:
  """Keeps this process on `count` cores; call it before JAX counts the cores.

  XLA's own flags for one thread do not limit all of its threads.

  Args:
    count: cores, the last ones of those that the process may use.

  Raises:
    ValueError: the process has fewer.
  """
  cores = sorted(os.sched_getaffinity(0))
  if len(cores) < count:
    raise ValueError(f"threads={count}: there are {len(cores)} cores.")
  os.sched_setaffinity(0, cores[-count:])


def read(path: str) -> list[dict]:
  """Reads the CSV of `measure_missing`; no rows if it does not exist."""
  if not Path(path).exists():
    return []
  with Path(path).open() as file:
    return [
      {key: _value(cell) for key, cell in row.items()}
      for row in csv.DictReader(file)
    ]


def _cell(value: object) -> str:
  """Formats a value: a string as it is, all else in JSON."""
  return value if isinstance(value, str) else json.dumps(value)


def _value(cell: str) -> object:
  """Reads a cell; a string that looks like JSON comes back as its value."""
  try:
    return json.loads(cell)
  except json.JSONDecodeError:
    return cell


def median_times(
  call: Callable[[], object],
  repeats: int,
  *,
  enough_s: float | None = None,
  in_turn: bool = False,
  settle_s: float = 0.5,
) -> tuple[float, float]:
  """Returns median wall and CPU seconds (of all threads) of a call.

  Args:
    call: waits for its results; has run once before.
    repeats: number of timed runs.
    enough_s: stops after this many seconds of timed runs, but not before three
      runs.
    in_turn: whether to ask the parent process, `measure_missing`, for a turn
      before each run.
    settle_s: seconds of untimed runs at the start of each turn, since the
      kernel may still be freeing memory of another process; none once a run
      takes longer.
  """
  wall, cpu = [], []
  for _ in range(repeats):
    if in_turn:
      print(_TURN, end="", flush=True)
      sys.stdin.readline()
      if not wall or wall[-1] < settle_s:
        _run_for(call, settle_s)
    clocks = time.perf_counter(), time.process_time()
    call()
    wall.append(time.perf_counter() - clocks[0])
    cpu.append(time.process_time() - clocks[1])
    if enough_s is not None and sum(wall) > enough_s and len(wall) >= 3:
      break
  return statistics.median(wall), statistics.median(cpu)


def _run_for(call: Callable[[], object], seconds: float) -> None:
  """Repeats a call for that many seconds."""
  end = time.perf_counter() + seconds
  while time.perf_counter() < end:
    call()
