"""Figures that two files state: config headers, README, docs, code."""

import importlib
import re

import pytest

from spectraformer_jax.train import recipes
from tests.train.helpers import ROOT


def header(config: str) -> str:
  """The docstring of a config, on one line."""
  return " ".join(importlib.import_module(f"configs.{config}").__doc__.split())


def section(config: str, variant: str) -> str:
  """The part of a config's header about a variant, on one line."""
  text = header(config)
  start = text.index(f"{config}.py:{variant}: ")
  end = re.search(r" \w+\.py:\w+|For comparison|$", text[start + 1 :]).start()
  return text[start : start + 1 + end]


def rows(
  path: str, start: str, num_cells: int | None = None
) -> list[list[str]]:
  """Rows of the tables of a Markdown file that begin with a text."""
  lines = (ROOT / path).read_text().splitlines()
  cells = [
    [x.strip() for x in line.strip("|").split("|")]
    for line in lines
    if line.startswith("|")
  ]
  return [
    row
    for row in cells
    if row[0].startswith(start) and num_cells in (None, len(row))
  ]


def percent(text: str) -> list[str]:
  """The figures of "36.9, 34.9 % with seeds 0 and 1"."""
  return re.findall(r"\d+\.\d", text)


QUICK = (
  "fashion",
  "imdb_half",
  "listops",
  "mail_replies",
  "pathfinder_synthetic",
  "same_speech",
  "spam_bodies",
)


@pytest.mark.parametrize("config", QUICK)
def test_header_of_a_quick_run_states_the_measured_accuracy(config):
  (row,) = rows("docs/data.md", f"`{config}.py:quick`")
  test_accuracy = f"{100 * float(row[6]):.1f}"
  _, _, measured = section(config, "quick").partition("easured here")
  assert percent(measured)[0] == test_accuracy


@pytest.mark.parametrize("config", sorted({*QUICK} - {"pathfinder_synthetic"}))
def test_header_states_the_accuracy_of_the_commonest_label(config):
  (row,) = rows("docs/data.md", f"`{config}.py:quick`")
  text = header(config)
  stated = re.findall(r"commonest label (?:gives )?(\d+\.\d) %", text)
  assert f"{100 * float(row[7]):.1f}" in stated


def test_listops_in_the_readme_is_listops_in_its_header():
  (row,) = rows("README.md", "listops (generated, 100 to 511 tokens), quick")
  text = section("listops", "quick")
  _, _, measured = text.partition("Measured here")
  stated = percent(row[3])
  # Seeds 0 and 1, the root operator, the commonest label.
  assert percent(measured) == [stated[0], stated[1], stated[3], stated[2]]
  minutes = re.search(r"\d+ min", row[5])[0]
  assert f"{minutes}utes each" in measured


def test_deep_listops_in_accuracy_md_is_that_in_its_header():
  name = (
    "`:deep`: 4 layers, 4 heads of 16, M = 64, rotary, gated, CLS, no dropout, "
    "recipe `modern`"
  )
  (row,) = rows("docs/accuracy.md", name)
  text = section("listops", "deep")
  assert f"test {row[3]} of 10,000 examples" in text
  assert f"{round(int(row[5]) / 60)} minutes" in text
  rule = f"{float(row[3][:-2]) - float(row[4]):.1f}"
  assert any(abs(float(x) - float(rule)) < 0.15 for x in percent(text))


def test_table_of_recipes_is_that_of_the_code():
  for name in recipes.NAMES:
    values = recipes.recipe(name, 20)
    (row,) = rows("docs/training.md", f"`{name}`", num_cells=7)
    _, lr, schedule, warmup, adam, decay, clip = row
    assert schedule == values["schedule"]
    assert float(decay) == values["weight_decay"]
    assert [float(x) for x in adam.split(", ")] == [
      values["b1"],
      values["b2"],
      values["eps"],
    ]
    number = re.fullmatch(r"([\d.e-]+)(?: / sqrt\((\d+)\))?", lr)
    rate = float(number[1]) / float(number[2] or 1) ** 0.5
    assert rate == pytest.approx(values["lr"])
    assert warmup in (str(values["warmup_steps"]), "a twentieth of the steps")
    limits = {"value": "each value at 1", "global_norm": "global norm at 1"}
    assert clip == limits.get(values["clip"], values["clip"])


def test_table_of_exit_statuses_is_that_of_train_py():
  names = "USER_ERROR, DIVERGED, IO_ERROR, RESUMABLE = "
  (line,) = re.findall(f"^{names}(.*)$", (ROOT / "train.py").read_text(), re.M)
  for status in line.split(", "):
    assert len(rows("docs/training.md", status, num_cells=2)) == 1, status
