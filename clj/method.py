"""The one interface: a method of representation learning is four pure functions.

A method is what an optimiser is in optax: a NamedTuple of functions that close over
hyper-parameters, built by a function `make(**kwargs)`. The train step, the evaluators
and the checkpoints know nothing else about it.

Everything is in the global view: a batch is the whole batch, however many devices hold
it, and a method contains no collective, no device count and no axis name.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

Params = Any  # nested dict of arrays: what the optimiser updates
Extra = Any  # nested dict of arrays: carried and checkpointed, never differentiated
Batch = dict[str, jax.Array]  # flat; every leading axis is the global batch


class Aux(NamedTuple):
  """What a loss reports beside its value.

  metrics: scalars by name, float32.
  features: the encoder's output `[B, d]`, gradient stopped (see `with_probe`).
  """

  metrics: dict[str, jax.Array]
  features: jax.Array


class Method(NamedTuple):
  """Four pure functions.

  init: `(rng, batch) -> (params, extra)`. `batch` has the shapes of a training batch
    after augmentation; its values are zeros. Both results are dicts of strongly typed
    arrays, no array in both (the state is donated).
  loss: `(params, extra, batch, rng, step) -> (loss, (extra, aux))`. `step` counts
    finished updates, 0 in the first call. The loss is a float32 scalar over the whole
    batch; `extra` comes back with the same structure, shapes and dtypes.
  post: `(params, extra, step) -> (params, extra)`, after the optimiser: teachers that
    are moving averages, normalised prototypes. `step` is the one `loss` was given.
  embed: `(params, extra, batch) -> dict of arrays [B, d]`, for evaluation: statistics
    frozen, no dropout. `batch["image"]` is float32 in [0, 1], `[B, 1, H, W, 3]`. The
    key "features" is the encoder's output before any head.
  needs: the batch keys that `loss` reads, so that a missing one is an error before
    compilation.
  """

  init: Callable[[jax.Array, Batch], tuple[Params, Extra]]
  loss: Callable[..., tuple[jax.Array, tuple[Extra, Aux]]]
  post: Callable[[Params, Extra, jax.Array], tuple[Params, Extra]]
  embed: Callable[[Params, Extra, Batch], dict[str, jax.Array]]
  needs: tuple[str, ...] = ("image",)


def keep(params: Params, extra: Extra, step: jax.Array) -> tuple[Params, Extra]:
  """The `post` of a method that has nothing to do after the optimiser."""
  del step
  return params, extra
