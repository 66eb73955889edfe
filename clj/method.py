"""The one interface: a method of representation learning is four pure functions.

A method is what an optimiser is in optax: a NamedTuple of functions that close over
hyper-parameters, built by a function `make(model, *, total_steps, **kwargs)`. The train
step, the evaluators and the checkpoints know nothing else about it. Methods compose as
optimisers do: `with_probe(method, classes)` and `wise_ft(method, share)` are methods.

Everything is in the global view: a batch is the whole batch, however many devices hold
it, and a method contains no collective, no device count and no axis name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from clj.cli import UserError

Params = Any  # nested dict of arrays: what the optimiser updates
Extra = Any  # nested dict of arrays: carried and checkpointed, never differentiated
Batch = dict[str, jax.Array]  # flat; every leading axis is the global batch


class Aux(NamedTuple):
  """What a loss reports beside its value.

  metrics: scalars by name, float32.
  features: the encoder's output `[B, d]`, before any head, one row for each row of the
    batch, gradient stopped: what the online probe classifies (see `with_probe`).
  """

  metrics: dict[str, jax.Array]
  features: jax.Array


class Method(NamedTuple):
  """Four pure functions.

  init: `(rng, batch) -> (params, extra)`. `batch` has the shapes of a training batch
    after augmentation; its values are zeros. Both results are dicts of strongly typed
    arrays, no array in both (the state is donated).
  loss: `(params, extra, batch, rng, step) -> (loss, (extra, aux))`. `rng` is the
    step's, and the method's alone: it may be split (the views have another). `step`
    counts finished updates, 0 in the first call. The loss is a float32 scalar over the
    whole batch; `extra` comes back with the same structure, shapes and dtypes.
  post: `(params, extra, step) -> (params, extra)`, after the optimiser: teachers that
    are moving averages, normalised prototypes. `step` is the one `loss` was given.
  embed: `(params, extra, batch) -> dict of arrays [B, ...]` by name, for evaluation:
    statistics frozen, no dropout. It takes any subset of a batch's keys and answers
    what these allow: the embedding of a modality under the modality's name, "features",
    the encoder's output before any head, more where there is more to look at (patch
    tokens). What a caller drops inside the same jit is not computed. `batch["image"]`
    is float32 in [0, 1], `[B, 1, H, W, 3]`.
  needs: the batch keys that `loss` reads, so that a missing one is an error before
    compilation. Pictures are `[B, V, H, W, 3]`, texts `[B, L]` with a mask, NAME_mask.
  locked: a regular expression on names of parameters that `loss` does not train: the
    optimiser leaves them alone (no decay either) and has no state for them.
  limits: `params -> {key: n}`: the ids of `batch[key]` must be below n, the size of the
    table they look up. Beyond it there would be no error but a loss that is not finite.

  `extra` is all that is carried but not differentiated: batch statistics, teachers,
  queues, centres. What has a gradient, or is decayed, is in `params`.
  """

  init: Callable[[jax.Array, Batch], tuple[Params, Extra]]
  loss: Callable[..., tuple[jax.Array, tuple[Extra, Aux]]]
  post: Callable[[Params, Extra, jax.Array], tuple[Params, Extra]]
  embed: Callable[[Params, Extra, Batch], dict[str, jax.Array]]
  needs: tuple[str, ...] = ("image",)
  locked: str = ""
  limits: Callable[[Params], dict[str, int]] = lambda params: {}


def keep(params: Params, extra: Extra, step: jax.Array) -> tuple[Params, Extra]:
  """The `post` of a method that has nothing to do after the optimiser."""
  del step
  return params, extra


def with_probe(method: Method, classes: int) -> Method:
  """Adds an online linear probe: a classifier on `aux.features`, gradient stopped.

  It learns from `batch["label"]` beside the method and changes nothing for it; its
  parameters are `params["probe"]`, its cross-entropy is added to the loss (and reported
  as "probe/loss" with "probe/accuracy"). Rows with label -1 have no weight.
  """

  def split(params):
    return params["probe"], {k: v for k, v in params.items() if k != "probe"}

  def init(rng, batch):
    params, extra = method.init(rng, batch)
    step = jnp.zeros((), jnp.int32)
    _, (_, aux) = jax.eval_shape(method.loss, params, extra, batch, rng, step)
    width = aux.features.shape[-1]
    probe = {"kernel": jnp.zeros((width, classes)), "bias": jnp.zeros((classes,))}
    return {**params, "probe": probe}, extra

  def loss(params, extra, batch, rng, step):
    probe, params = split(params)
    value, (extra, aux) = method.loss(params, extra, batch, rng, step)
    features = jax.lax.stop_gradient(aux.features)
    logits = features @ probe["kernel"] + probe["bias"][None]
    label = batch["label"]
    weight = (label >= 0).astype(jnp.float32)
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(logits), jnp.maximum(label, 0)[:, None], axis=1
    )[:, 0]
    count = jnp.maximum(weight.sum(), 1.0)
    probe_loss = -(weight * picked).sum() / count
    correct = weight * (logits.argmax(1) == label)
    metrics = {"probe/loss": probe_loss, "probe/accuracy": correct.sum() / count}
    aux = aux._replace(metrics=aux.metrics | metrics)
    return value + probe_loss, (extra, aux)

  def post(params, extra, step):
    probe, params = split(params)
    params, extra = method.post(params, extra, step)
    return {**params, "probe": probe}, extra

  def embed(params, extra, batch):
    return method.embed(split(params)[1], extra, batch)

  def limits(params):
    return method.limits(split(params)[1]) | {"label": classes}

  needs = (*method.needs, "label")
  return Method(init, loss, post, embed, needs, method.locked, limits)


def wise_ft(method: Method, share: float) -> Method:
  """Evaluates with weights between those of the start and the trained ones.

  WiSE-FT, Wortsman et al., 2021, arXiv:2109.01903, Eq. 1: fine-tuned weights averaged
  with the weights that they came from keep the accuracy of those on other data. All
  parameters are averaged, batch statistics are the trained ones. The outputs of `embed`
  have their names; those of the trained weights alone have the prefix "trained_".

  share: of the trained weights, the paper's alpha, between 0 and 1. The others are
    `extra["start"]`, a copy of `params` that `init` makes; `init_from` has to fill it
    in too, as the `init_rename` of `configs/clip.py:finetune` does.
  """
  if not 0 <= share <= 1:
    raise UserError(f"method.wise_ft is {share}: a share between 0 and 1, or None")

  def split(extra):
    return extra["start"], {k: v for k, v in extra.items() if k != "start"}

  def init(rng, batch):
    params, extra = method.init(rng, batch)
    return params, {**extra, "start": jax.tree.map(jnp.copy, params)}

  def loss(params, extra, batch, rng, step):
    start, extra = split(extra)
    value, (extra, aux) = method.loss(params, extra, batch, rng, step)
    return value, ({**extra, "start": start}, aux)

  def post(params, extra, step):
    start, extra = split(extra)
    params, extra = method.post(params, extra, step)
    return params, {**extra, "start": start}

  def embed(params, extra, batch):
    start, extra = split(extra)
    averaged = average(start, params, share)
    trained = method.embed(params, extra, batch)
    trained = {f"trained_{name}": value for name, value in trained.items()}
    return method.embed(averaged, extra, batch) | trained

  return method._replace(init=init, loss=loss, post=post, embed=embed)


def average(start: Params, trained: Params, share: float) -> Params:
  """`share` of the trained weights, the rest of those of the start."""
  mix = lambda old, new: (1 - share) * old + share * new
  return jax.tree.map(mix, start, trained)
