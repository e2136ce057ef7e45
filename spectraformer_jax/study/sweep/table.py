"""Writes a sweep's results as a table like the paper's: Markdown, CSV, LaTeX.

  python -m spectraformer_jax.study table runs/s --out=docs/results/s

Several folders are read as one sweep (the shards of several machines). A tar
archive of a sweep's folder is read like the folder.
"""

from collections.abc import Sequence
from pathlib import Path

from spectraformer_jax import commands
from spectraformer_jax.study.sweep import table_text
from spectraformer_jax.study.sweep.comparison import compare
from spectraformer_jax.study.sweep.runs import read_runs
from spectraformer_jax.train.run.run_folder import write_text


def main(argv: Sequence[str]) -> None:
  """Runs the command."""
  parser = commands.Parser("spectraformer_jax.study table", __doc__)
  parser.add_argument("folder", nargs="+", help="of the sweep, or its archive")
  parser.add_argument("--out", required=True, help="folder of the tables")
  parser.add_argument(
    "--against",
    help="attention to compare with; default softmax, or else the best",
  )
  parser.add_argument("--command", help="how it was run, for the table's foot")
  args = parser.parse_args(argv)
  runs, unfinished = read_runs(args.folder)
  comparison, out = compare(runs, args.against), Path(args.out)
  markdown = table_text.markdown(comparison, unfinished, args.command)
  write_text(out / "table.md", markdown)
  write_text(out / "table.tex", table_text.latex(comparison))
  write_text(out / "table.csv", table_text.entries_csv(comparison))
  write_text(out / "cells.csv", table_text.runs_csv(runs))
  print(markdown)
