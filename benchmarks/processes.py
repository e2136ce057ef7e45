"""Cases timed alone or in turn, each in its own process, kept in a CSV."""

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
  """Measures what the CSV lacks, with a bar.

  Args:
    module: runs as ``python -m module --one CASE ARGUMENTS``, and prints a JSON
      object with the figures in its last line.
    path: of the CSV; written as figures come.
    cases: all with the same keys.
    figures: names of what is measured.
    arguments: more flags for each process.
    compared: a key. Cases that differ in it alone are timed in turn, a call of
      each at a time, since the speed of a machine may change by more than they
      differ; see `median_times`.

  Returns:
    Rows of the CSV, old and new; those that failed are named and left out.
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
  """Cases that differ in `compared` alone, together; without it each alone."""
  groups = {}
  for case in cases:
    same = {key: value for key, value in case.items() if key != compared}
    groups.setdefault(json.dumps(same), []).append(case)
  return list(groups.values())


def _run_in_turn(commands: Sequence[list[str]]) -> list["_Run"]:
  """Runs each to its end; once all ask for turns, one works at a time."""
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
    """Waits until it asks for a turn: True, or ends: False."""
    for line in self.process.stdout:
      if line == _TURN:
        return True
      self.last = line
    self.process.wait()
    return False

  def take_turn(self) -> bool:
    """Lets it work for one turn, and waits as `until_turn` does."""
    with contextlib.suppress(BrokenPipeError):  # it has died
      self.process.stdin.write("\n")
      self.process.stdin.flush()
    return self.until_turn()

  def end(self) -> None:
    """Kills it if it still runs, and keeps what it said of errors."""
    self.process.kill()
    self.process.communicate()
    with self._stderr:
      self._stderr.seek(0)
      self.errors = self._stderr.read()


def use_cores(count: int) -> None:
  """Keeps this process to that many cores; call it before jax counts them.

  XLA's own flags for one thread do not hold back all of its threads.

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
  """Rows of a CSV that `measure_missing` wrote; none if there is no file."""
  if not Path(path).exists():
    return []
  with Path(path).open() as file:
    return [
      {key: _value(cell) for key, cell in row.items()}
      for row in csv.DictReader(file)
    ]


def _cell(value: object) -> str:
  """A string as it is, all else in JSON."""
  return value if isinstance(value, str) else json.dumps(value)


def _value(cell: str) -> object:
  """What `_cell` wrote; a string that looks like JSON does not come back."""
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
  """Median wall and CPU seconds (of all threads) of a call.

  Args:
    call: returns when its results are there; it has run once before.
    repeats: how often it runs.
    enough_s: it runs no more once it took so long in all, but thrice at least.
    in_turn: before each run, ask the process that started this one, which is
      `measure_missing`.
    settle_s: in each turn it first runs so long untimed, unless one run takes
      that time: where others freed GiB, the kernel is still busy with them.
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
  """Runs it until so much time has gone."""
  end = time.perf_counter() + seconds
  while time.perf_counter() < end:
    call()
