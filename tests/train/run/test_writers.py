import json

from spectraformer_jax.train.run.writers import (
  MetricWriter,
  read_rows,
  result_row,
)


def write(workdir, rows, start_step=0, tensorboard=False):
  with MetricWriter(
    workdir, start_step=start_step, tensorboard=tensorboard
  ) as writer:
    for step, values in rows:
      writer.write(step, values)


def steps(workdir):
  return [row["step"] for row in read_rows(workdir)]


def test_rows_are_json_lines(tmp_path):
  write(tmp_path, [(1, {"train/loss": 0.5}), (2, {"dev/loss": 0.25})])
  lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  assert rows == read_rows(tmp_path)
  assert rows[0]["train/loss"] == 0.5 and rows[0]["time"] > 1.6e9


def test_a_row_is_readable_at_once(tmp_path):
  with MetricWriter(tmp_path, start_step=0, tensorboard=False) as writer:
    writer.write(1, {"train/loss": 0.5})
    assert steps(tmp_path) == [1]


def test_resuming_drops_later_rows_and_half_written_ones(tmp_path):
  write(tmp_path, [(step, {"train/loss": 0.0}) for step in (2, 4, 6)])
  with (tmp_path / "metrics.jsonl").open("a") as file:
    file.write('{"step": 8, "train/l')
  assert steps(tmp_path) == [2, 4, 6]
  write(tmp_path, [(6, {"train/loss": 1.0})], start_step=4)
  rows = read_rows(tmp_path)
  assert [row["step"] for row in rows] == [2, 4, 6]
  assert rows[-1]["train/loss"] == 1.0


def test_a_new_run_drops_everything(tmp_path):
  write(tmp_path, [(2, {"train/loss": 0.0})])
  write(tmp_path, [], start_step=0)
  assert steps(tmp_path) == []


def test_result_row(tmp_path):
  assert result_row([]) is None
  write(tmp_path, [(2, {"dev/loss": 0.0})])
  assert result_row(read_rows(tmp_path)) is None
  write(tmp_path, [(2, {"test/accuracy": 0.5})], start_step=2)
  assert result_row(read_rows(tmp_path))["test/accuracy"] == 0.5
  # A run that goes on, because its report was wanted again, has no result yet.
  write(tmp_path, [], start_step=2)
  assert steps(tmp_path) == [2]


def test_tensorboard_gets_the_metrics(tmp_path):
  values = {"train/loss": 0.5, "note": "text", "baselines": {"a": 0.1}}
  write(tmp_path, [(1, values)], tensorboard=True)
  (path,) = (tmp_path / "tensorboard").iterdir()
  content = path.read_bytes()
  assert b"train/loss" in content and b"note" not in content
