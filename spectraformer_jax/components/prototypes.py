"""Exponentials of learnt rows: prototypes of keys, and pairs of vectors."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from typing_extensions import override

from spectraformer_jax.components import base
from spectraformer_jax.components.learnt import Learnt, start_rows
from spectraformer_jax.typing import (
  Array,
  ComponentState,
  LogFeatures,
  Params,
  Side,
  WeightSample,
)


@dataclasses.dataclass(frozen=True)
class PrototypeRows(Learnt):
  """Base of the components whose rows can start as prototypes of the keys.

  Attributes:
    kernel: the kernel that the map copies once it is started from data or
      fitted; hybrid attention takes exact weights from it.
  """

  kernel: ClassVar[str] = "softmax"
  starts_from_data: ClassVar[bool] = True

  @override
  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    """Returns equal rows for both sides, and biases that take a mean over M.

    With other rows for each side the kernel would start without any dependence
    on x.y.
    """
    rows = start_rows(rng, num_features, head_dim)
    bias = jnp.full((num_features,), -math.log(num_features), jnp.float32)
    return {"query_rows": rows, "key_rows": 1.0 * rows, "key_bias": bias}

  @override
  def start(self, params: Params, centres: Array, mean_key: Array) -> Params:
    r"""Makes the centres p_m of the keys prototypes; mu is the mean key.

    .. math::
      w_m = p_m, \quad v_m = p_m - \mu, \quad
      c_m = -\tfrac12 |p_m - \mu|^2 - (p_m - \mu) \cdot \mu - \log M

    So a softmax of :math:`v_m \cdot y + c_m` prefers the nearest prototypes. A
    shift of all keys by mu changes none of these values.
    """
    offset = centres - mean_key[None]
    shift = jnp.einsum("mh,h->m", offset, mean_key, precision="highest")
    log_size = math.log(centres.shape[0])
    return {
      **params,
      "query_rows": centres,
      "key_rows": offset,
      "key_bias": -base.half_square(offset)[:, 0] - shift - log_size,
    }

  def key_scores(self, y: Array, params: Params) -> Array:
    """Returns ``v.y + c``, ``[T, M]``."""
    return base.project(y, params["key_rows"]) + params["key_bias"][None]


@base.COMPONENTS.register("prototypes")
@dataclasses.dataclass(frozen=True)
class Prototypes(PrototypeRows):
  r"""Learnt prototypes of the keys, among which each key is shared out.

  .. math::
    f_q(x)_m = e^{w_m \cdot x + b_m}, \qquad
    f_k(y)_m = \frac{e^{z_m}}{(\sum_n e^{z_n})^t}, \quad z_m = v_m \cdot y + c_m

  with learnt rows :math:`w_m, v_m` and biases :math:`b_m, c_m`. With t = 1 the
  shares of a key add up to 1. If :math:`w_m = p_m`, :math:`v_m = \kappa p_m`
  and :math:`c_m = -\kappa |p_m|^2 / 2`, they go to the prototypes :math:`p_m`
  nearest to y, and for :math:`\kappa \to \infty` the kernel is
  :math:`e^{x \cdot p(y)}`: softmax attention to quantised keys, whose log is
  off by at most :math:`|x| |y - p(y)|`.

  It has no rows of W: weight matrix "none" with num_features=M. It is made to
  be fitted to the attention of a trained model, see `sf.linearize`.

  Args:
    share: t, a number from 0 to 1; or "learned", which starts at 1.

  Raises:
    ValueError: any other share.

  References:
    Lingle, Transformer-VQ, 2023, section 3 (2309.16354), has hard codes in
    place of the shares and learns them from the keys alone.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("prototypes", "none", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> sorted(v.params["component"])
    ['key_bias', 'key_rows', 'query_bias', 'query_rows', 'share']
    >>> fm.apply(v, jnp.ones((3, 1, 4)), side="key").shape
    (3, 1, 16)
  """

  share: float | str = "learned"

  info = base.ComponentInfo(
    name="prototypes",
    family="learnt",
    estimates="its own kernel, learnt",
    formula="exp(w.x + b); exp(z) / (sum of exp(z))^t, z = v.y + c",
    positive=True,
    cost="M exponentials",
    good_for="copying the attention of a trained model, in few features",
    avoid="estimates of softmax without a fit to data",
    source="this project; hard codes: 2309.16354, section 3",
    row_law="none",
    learnable=True,
  )

  def __post_init__(self) -> None:
    share = self.share
    if isinstance(share, int | float) and not isinstance(share, bool):
      is_known = 0.0 <= share <= 1.0
    else:
      is_known = share == "learned"
    if not is_known:
      raise ValueError(
        f"share must be 'learned' or a number from 0 to 1, got {share!r}."
      )

  @override
  def init(self, rng: Array, head_dim: int, num_features: int) -> Params:
    params = super().init(rng, head_dim, num_features)
    params["query_bias"] = jnp.zeros((num_features,), jnp.float32)
    if self.share == "learned":
      params["share"] = jnp.ones((), jnp.float32)
    return params

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    params = state.params
    if side == "query":
      scores = base.project(x, params["query_rows"])
      return LogFeatures(scores + params["query_bias"][None])
    scores = self.key_scores(x, params)
    total = jax.nn.logsumexp(scores, axis=-1, keepdims=True)
    share = params.get("share", self.share)
    return LogFeatures(scores - share * total)


@base.COMPONENTS.register("learned_exp")
@dataclasses.dataclass(frozen=True)
class LearnedExp(PrototypeRows):
  r"""Exponentials of learnt rows, other ones for queries than for keys.

  .. math:: f_q(x)_m = e^{w_m \cdot x}, \qquad f_k(y)_m = e^{v_m \cdot y + c_m}

  with learnt :math:`w_m, v_m` and :math:`c_m`. It is `Prototypes` with t = 0,
  where a bias of the queries would add to :math:`c_m`. Rows that are the same
  for both sides are weight matrix "free" on component "posrf".

  It has no rows of W: weight matrix "none" with num_features=M.

  References:
    None: exponentials of linear maps are in many papers; Zhang et al., The
    Hedgehog & the Porcupine, 2024, section 4 (2402.04347), fits such maps.

  Example:
    >>> import jax, jax.numpy as jnp, spectraformer_jax as sf
    >>> fm = sf.feature_map("learned_exp", "none", num_features=16)
    >>> v = fm.init(jax.random.key(0), head_dim=4)
    >>> sorted(v.params["component"])
    ['key_bias', 'key_rows', 'query_rows']
    >>> phi = fm.apply(v, jnp.zeros((1, 1, 4)), side="query")[0, 0]
    >>> psi = fm.apply(v, jnp.zeros((1, 1, 4)), side="key")[0, 0]
    >>> round(float(phi @ psi), 5)
    1.0
  """

  info = base.ComponentInfo(
    name="learned_exp",
    family="learnt",
    estimates="its own kernel, learnt",
    formula="exp(w.x); exp(v.y + c)",
    positive=True,
    cost="M exponentials",
    good_for="a fit like that of prototypes, with less work for keys",
    avoid="estimates of softmax without a fit to data",
    source="2402.04347, section 4, without its softmax over features",
    row_law="none",
    learnable=True,
  )

  @override
  def log_features(
    self, x: Array, rows: WeightSample, side: Side, state: ComponentState
  ) -> LogFeatures:
    if side == "query":
      return LogFeatures(base.project(x, state.params["query_rows"]))
    return LogFeatures(self.key_scores(x, state.params))
