"""Folders of sweeps whose figures are made up."""

import json


def write_run(folder, task, attention, seed, accuracy, **changes):
  """A finished cell with these figures."""
  workdir = folder / task / attention / f"seed{seed}"
  workdir.mkdir(parents=True)
  result = {
    "step": 100,
    "test/accuracy": accuracy,
    "test/accuracy_last": accuracy - 0.01,
    "dev/accuracy_best": accuracy + 0.01,
    "best_step": 50,
    "train_seconds": 90.0,
    "compile_seconds": 2.0,
    "step_seconds": 0.9,
    "peak_memory_bytes": 1_500_000_000,
    "peak_device_bytes": None,
    "parameters": 12_345,
    "provenance": "generated",
    "baselines": {"majority": 0.17},
  } | changes
  rows = [
    {"step": step, "train/loss": 2.0 - step / 100, "train/accuracy": 0.1}
    for step in range(10, 101, 10)
  ]
  rows += [
    {"step": step, "dev/loss": 2.0, "dev/accuracy": accuracy * step / 100}
    for step in (50, 100)
  ]
  lines = [json.dumps(row) + "\n" for row in [*rows, result]]
  (workdir / "metrics.jsonl").write_text("".join(lines))
  split = {"name": task, "num_examples": 400}
  stored = {
    "config": {"train": {"num_steps": 100, "batch_size": 8}},
    "data": {"train": split, "dev": split, "test": split},
    "environments": [
      {
        "git_revision": "abc",
        "jax": "1",
        "platform": "p",
        "cpus": 2,
        "devices": ["cpu"],
      }
    ],
  }
  (workdir / "config.json").write_text(json.dumps(stored))
  return workdir


def write_sweep(folder, attentions, tasks=("listops", "digits"), seeds=3):
  """Accuracies that differ by attention, task and a little by seed."""
  for t, task in enumerate(tasks):
    for i, attention in enumerate(attentions):
      for seed in range(seeds):
        write_run(
          folder,
          task,
          attention,
          seed,
          0.4 + 0.3 * t + 0.02 * i + 0.002 * seed,
          train_seconds=60.0 * (i + 1) * (t + 1),
          peak_memory_bytes=10**9 + 10**8 * (i * i % 7),
        )
