"""Cases timed one by one, each in a process of its own, kept in a CSV."""

import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path


def measure_missing(
  script: str,
  path: str,
  cases: Sequence[dict],
  figures: Sequence[str],
  arguments: Sequence[str] = (),
) -> list[dict]:
  """Measures what the CSV lacks, with a bar.

  Args:
    script: run as ``script --one CASE ARGUMENTS``; the last line that it prints
      is a JSON object with the figures.
    path: of the CSV; written row by row.
    cases: all with the same keys.
    figures: names of what is measured.
    arguments: more flags for each process.

  Returns:
    Rows of the CSV, old and new; those that failed are named and left out.
  """
  from rich.progress import track

  names = tuple(cases[0]) if cases else ()
  rows = read(path)
  is_new = not rows
  done = [{name: row[name] for name in names} for row in rows]
  with Path(path).open("a") as file:
    writer = csv.writer(file)
    if is_new:
      writer.writerow([*names, *figures])
    for case in track(cases, "measuring"):
      if case in done:
        continue
      command = [sys.executable, script, "--one", json.dumps(case), *arguments]
      child = subprocess.run(command, capture_output=True, text=True)
      if child.returncode:
        print(f"{case} failed:\n{child.stderr[-500:]}", file=sys.stderr)
        continue
      row = case | json.loads(child.stdout.splitlines()[-1])
      rows.append(row)
      writer.writerow([_cell(row[name]) for name in (*names, *figures)])
      file.flush()
  return rows


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
  call: Callable[[], object], repeats: int, *, enough_s: float | None = None
) -> tuple[float, float]:
  """Median wall and CPU seconds (of all threads) of a call.

  Args:
    call: returns when its results are there; it has run once before.
    repeats: how often it runs.
    enough_s: it runs no more once it took so long in all, but thrice at least.
  """
  wall, cpu = [], []
  for _ in range(repeats):
    clocks = time.perf_counter(), time.process_time()
    call()
    wall.append(time.perf_counter() - clocks[0])
    cpu.append(time.process_time() - clocks[1])
    if enough_s is not None and sum(wall) > enough_s and len(wall) >= 3:
      break
  return statistics.median(wall), statistics.median(cpu)
