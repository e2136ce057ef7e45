"""What a fit and its certificate say, and the error of a fit that fails."""

from typing import NamedTuple

import numpy as np

from spectraformer_jax.typing import FeatureVariables


class FitReport(NamedTuple):
  """The course of one fit.

  Attributes:
    losses: of each step, on sampled rows, ``[steps]``.
    checked_steps: steps before which the held-out loss was measured,
      ``[checks]``; the first is 0, the last is the number of steps.
    held_out: held-out losses at `checked_steps`, ``[checks]``.
    uniform: held-out loss of attention that ignores queries and keys.
    best_step: number of steps after which the returned parameters were found; 0
      if no step made them better than the start, or if all were worse than
      uniform attention.
    learning_rate: of the fit, which is less than was asked for if the loss was
      not finite with that one.
    seconds: time of the fit, compilation included; None if the layer was read
      from a file.
  """

  losses: np.ndarray
  checked_steps: np.ndarray
  held_out: np.ndarray
  uniform: float
  best_step: int
  learning_rate: float
  seconds: float | None = None

  @property
  def start_loss(self) -> float:
    """The held-out loss before the first step."""
    return float(self.held_out[0])

  @property
  def best_loss(self) -> float:
    """The held-out loss of the returned parameters."""
    return float(self.held_out[list(self.checked_steps).index(self.best_step)])


class FittedLayer(NamedTuple):
  """One layer's feature map, as `fit_layers` returns it.

  Attributes:
    name: of the layer's inputs.
    variables: the fitted ones.
    start: the variables at which the fit began.
    report: of the fit.
  """

  name: str
  variables: FeatureVariables
  start: FeatureVariables
  report: FitReport


class Certificate(NamedTuple):
  """How far spectral attention is from the exact attention of a layer.

  An error is the Frobenius norm of the difference of the outputs over that of
  the exact output. Masked queries do not count.

  Attributes:
    error: of each query head, ``[N]``.
    error_all: of all heads together.
    uniform: `error` of attention that ignores queries and keys, ``[N]``.
    uniform_error: `error_all` of that attention.
    kl: of each head, mean KL divergence of the implied attention weights from
      the exact ones in nats, ``[N]``; NaN for maps with negative features.
    entropy: of the exact weights of each head, mean in nats, ``[N]``.
    score_std: standard deviation of each head's visible scores, ``[N]``.
    start: the certificate of other variables of the same map, such as those at
      which the fit began; None if there are none.
  """

  error: np.ndarray
  error_all: float
  uniform: np.ndarray
  uniform_error: float
  kl: np.ndarray
  entropy: np.ndarray
  score_std: np.ndarray
  start: "Certificate | None" = None


class NonFiniteLossError(ValueError):
  """The loss of a fit was not finite with any learning rate that was tried."""
