"""One record of options for all models, and what it leaves as it was."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import pytest

import spectraformer_jax as sf
from spectraformer_jax.nn.config import ModelFields

SIZES = {"vocab_size": 11, "max_len": 8}
MODELS = {
  sf.nn.Classifier: {**SIZES, "num_classes": 3},
  sf.nn.DualClassifier: {**SIZES, "num_classes": 3},
  sf.nn.SequenceEncoder: SIZES,
  sf.nn.TokenEncoder: SIZES,
  sf.nn.LanguageModel: SIZES,
  sf.nn.MaskedLanguageModel: SIZES,
  sf.nn.Seq2Seq: SIZES,
}


def fields_of(cls):
  return {
    field.name: (field.type, field.default)
    for field in dataclasses.fields(cls)
    if field.name not in ("parent", "name")
  }


def test_models_have_the_fields_of_the_record():
  assert fields_of(ModelFields) == fields_of(sf.nn.EncoderConfig)
  for model in MODELS:
    assert fields_of(sf.nn.EncoderConfig).items() <= fields_of(model).items()


def test_the_record_is_frozen_and_compares_by_its_fields():
  fm = sf.feature_map("posrf", "orf", num_features=8)
  config = sf.nn.EncoderConfig(feature_map=fm, num_layers=1)
  same = sf.nn.EncoderConfig(feature_map=fm, num_layers=1)
  assert config == same and hash(config) == hash(same)
  assert config != dataclasses.replace(config, num_layers=2)
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.num_layers = 2


@pytest.mark.parametrize("model", MODELS)
def test_a_model_of_a_record_is_the_model_of_keywords(model):
  options = {"num_layers": 1, "positions": "rotary", "attention": "softmax"}
  config = sf.nn.EncoderConfig(**options, remat=True)
  made = model.from_config(config, **MODELS[model], remat=False)
  assert made == model(**MODELS[model], **options)
  assert made.num_layers == 1 and made.attention == "softmax"
  # A module is a record, too.
  assert model.from_config(made) == made
  assert made.clone(num_layers=3).num_layers == 3
  assert dataclasses.replace(made, mlp="gated").mlp == "gated"


@pytest.mark.parametrize("layer", [sf.nn.Encoder, sf.nn.EncoderLayer])
def test_a_layer_takes_no_option_of_embeddings(layer):
  assert layer.from_config(sf.nn.EncoderConfig(num_heads=4)).num_heads == 4
  with pytest.raises(TypeError, match="positions"):
    layer(positions="rotary")


def test_fields_that_are_needed_can_be_given_by_position():
  assert sf.nn.Classifier(11, 3, 8) == sf.nn.Classifier(
    vocab_size=11, num_classes=3, max_len=8
  )
  assert sf.nn.LanguageModel(11, 8) == sf.nn.LanguageModel(**SIZES)
  fm = sf.feature_map("posrf", "orf", num_features=8)
  for attention in (sf.nn.SpectralSelfAttention, sf.nn.SpectralCrossAttention):
    names = list(inspect.signature(attention).parameters)
    assert names[:4] == ["num_heads", "head_dim", "feature_map", "attention"]
    assert attention(2, 4, fm).feature_map is fm
  with pytest.raises(TypeError, match="num_classes"):
    sf.nn.Classifier(**SIZES)


def test_models_of_one_record_compute_with_it():
  fm = sf.feature_map("posrf", "orf", num_features=8)
  config = sf.nn.EncoderConfig(
    feature_map=fm, num_layers=1, embed_dim=6, num_heads=1, head_dim=4
  )
  tokens, length = jnp.ones((2, 5), int), jnp.array([5, 2])
  for model, width in ((sf.nn.Classifier, 3), (sf.nn.SequenceEncoder, 6)):
    module = model.from_config(config, **MODELS[model])
    out, variables = jax.eval_shape(
      lambda module=module: module.init_with_output(
        jax.random.key(0), tokens, length
      )
    )
    assert out.shape == (2, width)
    assert sorted(variables["params"]["encoder"]) == ["layer_0", "norm"]
