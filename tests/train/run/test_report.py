import json

import pytest

from spectraformer_jax.train.run import report

RESULT = {
  "step": 20,
  "test/accuracy": 0.4321,
  "test/accuracy_best": 0.4321,
  "test/accuracy_last": 0.4123,
  "dev/accuracy_best": 0.45,
  "dev/accuracy_last": 0.44,
  "best_step": 10,
  "task": "listops-max_len64",
  "pair": "oprf-orf",
  "provenance": "generated",
  "baselines": {"majority label": 0.17, "root operator only": 0.362},
  "parameters": 81866,
  "projection_size": 16384,
  "examples_per_second": 123.4,
  "step_seconds": 0.26,
  "train_seconds": 60.0,
  "compile_seconds": 4.5,
  "peak_memory_bytes": 2**30,
  "peak_device_bytes": None,
}


@pytest.fixture
def workdir(tmp_path):
  rows = [
    {"step": 10, "train/loss": 2.0, "train/accuracy": 0.2},
    {"step": 10, "dev/loss": 1.9, "dev/accuracy": 0.45},
    {"step": 20, "train/loss": 1.5, "train/accuracy": 0.4},
    {"step": 20, "dev/loss": 1.8, "dev/accuracy": 0.44},
    RESULT,
  ]
  lines = [json.dumps(row) + "\n" for row in rows]
  (tmp_path / "metrics.jsonl").write_text("".join(lines))
  split = {"name": "listops-max_len64", "num_examples": 1000}
  env = {
    "command": "python train.py --config=configs/listops.py",
    "jax": "0.10.2",
    "devices": ["cpu"] * 2,
  }
  stored = {
    "config": {
      "train": {"batch_size": 32, "seed": 5, "num_steps": 20},
      "task": {"seed": 1},
    },
    "data": {"train": split, "dev": split, "test": split},
    "environments": [env],
  }
  (tmp_path / "config.json").write_text(json.dumps(stored))
  return tmp_path


def test_report_holds_the_numbers(workdir):
  report.write_report(workdir)
  text = (workdir / "report.md").read_text()
  for needed in (
    "listops-max_len64",
    "oprf-orf",
    "generated",
    "1,000 test",
    "43.21 % (step 10)",
    "41.23 % (step 20)",
    "45.00 %",
    "44.00 %",
    "majority label | 17.00 %",
    "root operator only | 36.20 %",
    "123.4 examples/s",
    "260.0 ms a step of 32",
    "4.5 s",
    "1,024 MiB",
    "81,866",
    "16,384 numbers",
    "0.10.2",
    "2 x cpu",
    "training 5, data 1",
    "python train.py --config=configs/listops.py",
  ):
    assert needed in text, needed


def test_curves_are_drawn(workdir):
  report.write_report(workdir)
  header = (workdir / "curves.png").read_bytes()[:8]
  assert header == b"\x89PNG\r\n\x1a\n"
  assert not list(workdir.glob(".*"))


def test_curves_of_a_run_under_way(workdir):
  path = workdir / "metrics.jsonl"
  path.write_text("\n".join(path.read_text().splitlines()[:2]) + "\n")
  report.plot_curves(workdir)
  with pytest.raises(ValueError, match="holds no finished run"):
    report.write_report(workdir)


def test_table_shows_every_line(workdir, capsys):
  report.print_summary(workdir)
  out = capsys.readouterr().out
  assert "43.21 %" in out and "root operator only" in out
