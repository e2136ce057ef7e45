"""Cases measured one by one, each in a process of its own, kept in a CSV."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
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
      writer.writerow([json.dumps(row[name]) for name in (*names, *figures)])
      file.flush()
  return rows


def read(path: str) -> list[dict]:
  """Rows of a CSV that `measure_missing` wrote; none if there is no file."""
  if not Path(path).exists():
    return []
  with Path(path).open() as file:
    return [
      {key: json.loads(value) for key, value in row.items()}
      for row in csv.DictReader(file)
    ]
