"""The committed sweep: its archive gives the committed tables and pictures."""

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from spectraformer_jax.study import __main__ as study
from tests.helpers import ROOT

SMALL = ROOT / "docs/results/small"
HOW = (
  "python -m spectraformer_jax.study sweep configs/sweeps/small.py "
  "--out=runs/small --jobs=2"
)


def test_tables_are_made_again_byte_for_byte(tmp_path):
  archive = str(SMALL / "cells.tar.gz")
  flags = [archive, f"--out={tmp_path}", f"--command={HOW}"]
  assert study.main(["table", *flags]) == 0
  names = {path.name for path in tmp_path.iterdir()}
  assert names == {"table.md", "table.csv", "table.tex", "cells.csv"}
  for name in names:
    committed, made = SMALL / name, tmp_path / name
    assert made.read_bytes() == committed.read_bytes(), name


@pytest.mark.slow
def test_pictures_are_made_again_byte_for_byte(tmp_path):
  archive = str(SMALL / "cells.tar.gz")
  assert study.main(["plot", archive, f"--out={tmp_path}"]) == 0
  names = {path.name for path in SMALL.glob("*.png")}
  assert names == {path.name for path in tmp_path.iterdir()}
  for name in names:
    committed, made = SMALL / name, tmp_path / name
    version = f"Matplotlib version{matplotlib.__version__},".encode()
    if version in committed.read_bytes():
      assert made.read_bytes() == committed.read_bytes(), name
    else:  # other versions draw letters a little differently
      pixels = [matplotlib.image.imread(path) for path in (committed, made)]
      assert np.mean(np.abs(pixels[0] - pixels[1])) < 0.02, name


def test_a_file_that_is_no_archive(tmp_path, capsys):
  (tmp_path / "cells.tar.gz").write_text("cells")
  flags = [str(tmp_path / "cells.tar.gz"), f"--out={tmp_path}"]
  assert study.main(["table", *flags]) == 2
  assert "is no folder and no tar archive" in capsys.readouterr().err
