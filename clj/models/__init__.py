"""Networks as pairs of pure functions; the only directory that knows flax.

A `Network` is what the rest of clj sees:

    params, stats = network.init(rng, x)
    y, stats = network.apply(params, stats, x, train=True)

`stats` are batch statistics (an empty dict where there are none): returned by `apply`,
never mutated, and unchanged with `train=False`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from clj.models.heads import MLP, Linear
from clj.models.resnet import ResNet


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


def _resnet(depths, bottleneck, width=1, stem="imagenet", **kwargs):
  widths = tuple(width * w for w in (64, 128, 256, 512))
  return ResNet(widths, depths, bottleneck, stem, **kwargs)


def _resnet_small(widths=(24, 48, 96), depths=(1, 1, 1), stem="patch", **kwargs):
  return ResNet(tuple(widths), tuple(depths), False, stem, **kwargs)


IMAGE = {
  "resnet18": partial(_resnet, (2, 2, 2, 2), False),
  "resnet34": partial(_resnet, (3, 4, 6, 3), False),
  "resnet50": partial(_resnet, (3, 4, 6, 3), True),
  "resnet101": partial(_resnet, (3, 4, 23, 3), True),
  "resnet152": partial(_resnet, (3, 8, 36, 3), True),
  "resnet200": partial(_resnet, (3, 24, 36, 3), True),
  "resnet_small": _resnet_small,  # minutes on a CPU: CIFAR and the demo
  "resnet_test": partial(_resnet_small, (8, 16), (1, 1)),  # compiles in a second or two
}


def image(name="resnet18", **kwargs) -> Network:
  """An image encoder: `[N, H, W, 3]` float32 in [0, 1] -> features `[N, d]` float32.

  name: a key of `IMAGE`. kwargs for the ResNets of the paper: `width` 1, 2 or 4
  (multiplies every layer), `stem` "imagenet" or "cifar", `zero_last_gamma` (True),
  `dtype` "float32" or "bfloat16" (of the computation only). `resnet_small` takes
  `widths` and `depths` of its stages instead of `width`, and `stem` "patch" too.

  Raises ValueError for an unknown name.
  """
  if name not in IMAGE:
    raise ValueError(f"unknown image encoder {name!r}; there are {', '.join(IMAGE)}")
  return network(IMAGE[name](**kwargs))


def projector(
  widths=(2048, 128),
  *,
  norm=True,
  bias=False,
  last_norm=True,
  last_gamma=True,
  last_beta=False,
  last_bias=False,
  std=0.01,
  dtype="float32",
) -> Network:
  """A projection or prediction head: `[N, d]` -> `[N, widths[-1]]` float32.

  Linear layers, ReLU between them. The defaults are SimCLR's official head
  (arXiv:2002.05709, `tf2/model.py`): no bias, batch norm after every layer, the last
  one without beta and without ReLU, kernels from normal(0, 0.01).

  norm, bias: batch norm after, and bias of, every layer but the last.
  last_norm, last_gamma, last_beta, last_bias: of the last layer; its batch norm has no
    parameters with `last_gamma=False`.
  std: of the kernels' normal initialisation; None means 1 / sqrt(fan-in).
  dtype: of the computation; parameters, statistics and output are float32.
  """
  return network(
    MLP(
      tuple(widths),
      norm=norm,
      bias=bias,
      last_norm=last_norm,
      last_gamma=last_gamma,
      last_beta=last_beta,
      last_bias=last_bias,
      std=std,
      dtype=dtype,
    )
  )


def linear(outputs) -> Network:
  """A linear classifier with bias, zero at the start: `[N, d]` -> `[N, outputs]`."""
  return network(Linear(outputs))
