import io
import logging

from absl import logging as absl_logging
from rich.console import Console

from spectraformer_jax.train.run import progress

VALUES = {"train/loss": 0.5, "train/accuracy": 0.75, "dev/accuracy": 0.7}


def lines(caplog, **kwargs):
  """What three updates print."""
  absl_logging.set_verbosity(absl_logging.INFO)
  with caplog.at_level(logging.INFO, logger="absl"):
    with progress.Progress(30, 0, bar=False, **kwargs) as shown:
      for step in (10, 20, 30):
        shown.step(step)
        shown.values(step, VALUES)
      shown.line("done")
  return [record.getMessage() for record in caplog.records]


def test_plain_lines(caplog):
  printed = lines(caplog, interval_seconds=0.0)
  assert printed[0].startswith("step 10/30  loss 0.500  acc 0.750  dev 0.700")
  assert "ETA" in printed[1] and printed[-1] == "done"


def test_plain_lines_keep_their_distance(caplog):
  assert lines(caplog, interval_seconds=60.0) == ["done"]


def test_bar(monkeypatch):
  out = io.StringIO()
  monkeypatch.setattr(
    progress,
    "Console",
    lambda stderr: Console(file=out, force_terminal=True, width=100),
  )
  with progress.Progress(30, 5, interval_seconds=1.0, bar=True) as shown:
    shown.step(10)
    shown.values(20, VALUES | {"train/examples_per_second": 99.9})
    shown.line("a line above the bar")
  text = out.getvalue()
  assert "20/30" in text and "loss 0.500" in text and "100 ex/s" in text
  assert "a line above the bar" in text


def test_bar_only_on_a_terminal(monkeypatch):
  monkeypatch.setattr("sys.stderr", io.StringIO())
  with progress.Progress(3, 0, interval_seconds=1.0, bar=None) as shown:
    shown.step(1)
  assert "\x1b" not in progress.sys.stderr.getvalue()
