import jax.numpy as jnp
import numpy as np

# Of a vocabulary of BERT.
PIECES = (
  *("[UNK]", "[CLS]", "[SEP]", "un", "##believ", "##able", "##bel", "cafe"),
  *("$", "5", ".", "日", "本"),
)


def made_up_weights(layers, width):
  rng = np.random.default_rng(0)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  weights = {
    f"embeddings.{name}_embeddings.weight": normal(64, width)
    for name in ("word", "position", "token_type")
  }
  linears = {
    **{
      f"attention.self.{x}": (width, width) for x in ("query", "key", "value")
    },
    "attention.output.dense": (width, width),
    "intermediate.dense": (4, width),
    "output.dense": (width, 4),
  }
  norms = ["attention.output.LayerNorm", "output.LayerNorm"]
  shapes = {"embeddings.LayerNorm": (width,)}
  for layer in range(layers):
    every = linears | dict.fromkeys(norms, (width,))
    shapes |= {f"encoder.layer.{layer}.{name}": every[name] for name in every}
  for name, shape in shapes.items():
    weights[f"{name}.weight"] = normal(*shape)
    weights[f"{name}.bias"] = normal(shape[0])
  return {name: jnp.asarray(array) for name, array in weights.items()}
