"""Flax Linen modules: attention, stacks, classifiers, language models, Seq2Seq.

Collections of a model: ``params`` (learnable; those of the feature maps are
called "feature_map"), ``random_features`` (the projections: random, redrawn by
`redraw`, saved with the model) and, for components with statistics="ema" and
for `pooled_norm`, ``feature_stats`` (running statistics). Models that decode
keep their state in ``cache``.
"""

from spectraformer_jax.nn.attention import SpectralSelfAttention
from spectraformer_jax.nn.classifier import Classifier
from spectraformer_jax.nn.config import EncoderConfig
from spectraformer_jax.nn.cross_attention import SpectralCrossAttention
from spectraformer_jax.nn.dual_classifier import DualClassifier
from spectraformer_jax.nn.encoder import Encoder, EncoderLayer
from spectraformer_jax.nn.generation import generate
from spectraformer_jax.nn.language_model import (
  LanguageModel,
  MaskedLanguageModel,
)
from spectraformer_jax.nn.positions import rotate
from spectraformer_jax.nn.pretrained import Pretrained, load_pretrained
from spectraformer_jax.nn.redraw import redraw
from spectraformer_jax.nn.seq2seq import Seq2Seq
from spectraformer_jax.nn.sequence_encoder import SequenceEncoder
from spectraformer_jax.nn.token_encoder import TokenEncoder

__all__ = [
  "Classifier",
  "DualClassifier",
  "Encoder",
  "EncoderConfig",
  "EncoderLayer",
  "LanguageModel",
  "MaskedLanguageModel",
  "Pretrained",
  "Seq2Seq",
  "SequenceEncoder",
  "SpectralCrossAttention",
  "SpectralSelfAttention",
  "TokenEncoder",
  "generate",
  "load_pretrained",
  "redraw",
  "rotate",
]
