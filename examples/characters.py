"""A character model that generates with a state of constant size.

    python examples/characters.py

Trains a causal Transformer with random-feature attention for a few minutes on
the language reference that comes with Python (pydoc's topics), continues a
prompt, and compares generation from the state with generation that reads the
whole text again for each character.
"""

import argparse
import time
from collections.abc import Callable
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track

import spectraformer_jax as sf

LENGTH = 256
PROMPT = "The following "


def read_text() -> np.ndarray:
  """Returns the text as bytes."""
  text = "\n\n".join(topics[name] for name in sorted(topics))
  return np.frombuffer(text.encode("ascii", "ignore"), np.uint8)


def train(
  model: sf.nn.LanguageModel,
  text: np.ndarray,
  num_steps: int,
  batch_size: int,
) -> dict[str, Any]:
  """Trains on random pieces of the text; returns the model's variables."""
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.adamw(optax.cosine_onecycle_schedule(num_steps, 3e-3)),
  )
  rngs = {"params": jax.random.key(0), "features": jax.random.key(1)}
  variables = model.init(rngs, jnp.zeros((1, LENGTH), int))
  params, fixed = variables.pop("params"), variables
  opt_state = tx.init(params)

  @jax.jit
  def step(
    params: Any, opt_state: Any, pieces: np.ndarray, rng: jax.Array
  ) -> tuple[Any, Any, jax.Array]:
    def loss(params: Any) -> jax.Array:
      logits = model.apply(
        {"params": params, **fixed},
        pieces[:, :-1],
        deterministic=False,
        rngs={"dropout": rng},
      )
      losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, pieces[:, 1:]
      )
      return losses.mean()

    value, grads = jax.value_and_grad(loss)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, value

  generator = np.random.default_rng(0)
  losses = []
  for i in track(range(num_steps), "training"):
    starts = generator.integers(0, len(text) - LENGTH - 1, batch_size)
    pieces = text[starts[:, None] + np.arange(LENGTH + 1)].astype(np.int32)
    rng = jax.random.fold_in(jax.random.key(2), i)
    params, opt_state, value = step(params, opt_state, pieces, rng)
    losses.append(value)
    if (i + 1) % 100 == 0:
      mean = float(jnp.mean(jnp.stack(losses[-100:])))
      print(f"step {i + 1}: {mean / np.log(2):.3f} bits per character")
  return {"params": params, **fixed}


def recompute(
  model: sf.nn.LanguageModel,
  variables: dict[str, Any],
  prompt: jax.Array,
  num_tokens: int,
) -> jax.Array:
  """Generates, but reads the whole text again for each character."""
  text = jnp.zeros((1, LENGTH), jnp.int32).at[:, : prompt.shape[1]].set(prompt)
  last = jax.jit(
    lambda text, i: model.apply(variables, text)[0, i - 1].argmax()
  )
  for i in range(prompt.shape[1], prompt.shape[1] + num_tokens):
    text = text.at[0, i].set(last(text, i))
  return text[:, prompt.shape[1] : prompt.shape[1] + num_tokens]


def timed(function: Callable[[], jax.Array]) -> tuple[jax.Array, float]:
  """Returns a result and the seconds it took, without compilation."""
  function()
  start = time.perf_counter()
  result = jax.block_until_ready(function())
  return result, time.perf_counter() - start


def main() -> None:
  """Trains, generates, and compares the two ways to generate."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--num_steps", type=int, default=600)
  parser.add_argument("--batch_size", type=int, default=16)
  parser.add_argument("--num_tokens", type=int, default=200)
  args = parser.parse_args()
  model = sf.nn.LanguageModel(
    vocab_size=128,
    max_len=LENGTH,
    embed_dim=128,
    num_heads=4,
    mlp_dim=256,
    feature_map=sf.feature_map("posrf", "orf", num_features=64),
  )
  text = read_text()
  print(f"{len(text):,} characters of Python's language reference")
  variables = train(model, text, args.num_steps, args.batch_size)
  prompt = jnp.array([list(PROMPT.encode())], jnp.int32)
  count = min(args.num_tokens, LENGTH - prompt.shape[1])
  with_state, seconds = timed(
    lambda: sf.nn.generate(model, variables, prompt, num_tokens=count)
  )
  again, slow = timed(lambda: recompute(model, variables, prompt, count))
  print(PROMPT + bytes(with_state[0].tolist()).decode())
  same = int((with_state == again).sum())
  print(
    f"\n{same} of {count} characters equal those of recomputation; "
    f"{1e3 * seconds / count:.2f} ms a character from the state, "
    f"{1e3 * slow / count:.2f} ms by recomputation"
  )


if __name__ == "__main__":
  main()
