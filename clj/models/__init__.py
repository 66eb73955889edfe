"""Networks as pairs of pure functions; the only directory that knows flax.

A `Network` is what the rest of clj sees:

    params, stats = network.init(rng, x)
    y, stats = network.apply(params, stats, x, train=True)

`stats` are batch statistics (an empty dict where there are none): returned by `apply`,
never mutated, and unchanged with `train=False`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Network(NamedTuple):
  """Two pure functions.

  init: `(rng, *inputs) -> (params, stats)`, float32; of the inputs only shapes and
    dtypes matter.
  apply: `(params, stats, *inputs, train, rng=None) -> (outputs, stats)`; `rng` feeds
    dropout where there is any.
  """

  init: Callable[..., tuple[Any, Any]]
  apply: Callable[..., tuple[Any, Any]]


def network(module) -> Network:
  """Turns a linen module, whose `__call__` takes `(*inputs, train)`, into a Network."""

  def init(rng, *inputs):
    variables = module.init(rng, *inputs, train=False)
    return variables["params"], variables.get("batch_stats", {})

  def apply(params, stats, *inputs, train, rng=None):
    rngs = None if rng is None else {"dropout": rng}
    variables = {"params": params, "batch_stats": stats}
    if not train:
      return module.apply(variables, *inputs, train=False, rngs=rngs), stats
    outputs, updated = module.apply(
      variables, *inputs, train=True, rngs=rngs, mutable=["batch_stats"]
    )
    return outputs, updated.get("batch_stats", stats)

  return Network(init, apply)
