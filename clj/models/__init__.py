"""Networks as pairs of pure functions; the only directory that knows flax.

A `Network` is what the rest of clj sees:

    params, stats = network.init(rng, x)
    y, stats = network.apply(params, stats, x, train=True)

`stats` are batch statistics (an empty dict where there are none): returned by `apply`,
never mutated, and unchanged with `train=False`.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from clj.cli import UnknownKey, UserError
from clj.models.clip_resnet import CLIPResNet
from clj.models.heads import MLP, Linear
from clj.models.resnet import ResNet
from clj.models.text import Text
from clj.models.transformer import Encoder
from clj.models.vit import ViT


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


# Widths, depths and heads; and where it is not four times the width, the hidden width.
SIZES = {
  "test": (16, 2, 2),
  "small": (64, 1, 4),
  "s": (384, 12, 6),
  "b": (768, 12, 12),
  "l": (1024, 24, 16),
  "so400m": (1152, 27, 16, 4304),
  "h": (1280, 32, 16),
  "g": (1408, 40, 16, 6144),
  "bigg": (1664, 48, 16, 8192),
  "text_b": (512, 12, 8),
  "text_rn50x4": (640, 12, 10),
  "text_l": (768, 12, 12),
  "text_rn50x64": (1024, 12, 16),
  "text_h": (1024, 24, 16),
  "text_bigg": (1280, 32, 20),
}


def _encoder(size, kwargs):
  """Takes the encoder's arguments out of `kwargs`."""
  names = ("width", "depth", "heads", "hidden")
  size = dict(zip(names, SIZES[size]))
  size |= {key: kwargs.pop(key) for key in names if key in kwargs}
  width = size.pop("width")
  fields = set(Encoder.__dataclass_fields__) - {"parent", "name"}
  options = {key: kwargs.pop(key) for key in list(kwargs) if key in fields}
  return {"width": width, "encoder": Encoder(**size, **options)}


def _vit(size, patch, **kwargs):
  return ViT(patch=patch, **_encoder(size, kwargs), **kwargs)


def _text(size, vocab, **kwargs):
  return Text(vocab=vocab, **_encoder(size, kwargs), **kwargs)


# What is not size: OpenAI's models, those of LAION (H, g and bigG), and SigLIP's in its
# authors' code (open_clip has the exact GELU in SigLIP's towers, not in SigLIP 2's).
_CLIP = {"activation": "quick_gelu", "eps": 1e-5}
_LAION = {"activation": "gelu", "eps": 1e-5}
_SIGLIP = {"activation": "gelu_tanh", "eps": 1e-6, "kernel_init": "xavier"}
_clip_vit = partial(_vit, kernel_init="torch", pre_norm=True, patch_bias=False)
_clip_text = partial(
  _text,
  vocab=49408,
  kernel_init="clip",
  causal=True,
  mask_padding=False,
  pool="highest",
)
_siglip_vit = partial(_vit, pool="map", **_SIGLIP)
_siglip_text = partial(
  _text,
  vocab=32000,
  mask_padding=False,
  pool="last",
  token_std=None,
  position_std=None,
  **_SIGLIP,
)

IMAGE = {
  "resnet18": partial(_resnet, (2, 2, 2, 2), False),
  "resnet34": partial(_resnet, (3, 4, 6, 3), False),
  "resnet50": partial(_resnet, (3, 4, 6, 3), True),
  "resnet101": partial(_resnet, (3, 4, 23, 3), True),
  "resnet152": partial(_resnet, (3, 8, 36, 3), True),
  "resnet200": partial(_resnet, (3, 24, 36, 3), True),
  "resnet_small": _resnet_small,  # minutes on a CPU: CIFAR and the demo
  "resnet_test": partial(_resnet_small, (8, 16), (1, 1)),  # compiles in a second or two
  "clip_rn50": partial(CLIPResNet, width=64, depths=(3, 4, 6, 3), outputs=1024),
  "clip_rn101": partial(CLIPResNet, width=64, depths=(3, 4, 23, 3), outputs=512),
  "clip_rn50x4": partial(CLIPResNet, width=80, depths=(4, 6, 10, 6), outputs=640),
  "clip_rn50x16": partial(CLIPResNet, width=96, depths=(6, 8, 18, 8), outputs=768),
  "clip_rn50x64": partial(CLIPResNet, width=128, depths=(3, 15, 36, 10), outputs=1024),
  "vit_test": partial(_vit, "test", patch=8),
  "vit_s16": partial(_vit, "s", patch=16),
  "vit_b32": partial(_vit, "b", patch=32),
  "vit_b16": partial(_vit, "b", patch=16),
  "vit_l16": partial(_vit, "l", patch=16),
  "vit_l14": partial(_vit, "l", patch=14),
  "vit_so400m14": partial(_vit, "so400m", patch=14),
  "vit_h14": partial(_vit, "h", patch=14),
  "vit_g14": partial(_vit, "g", patch=14),
  "clip_vit_b32": partial(_clip_vit, "b", patch=32, **_CLIP),
  "clip_vit_b16": partial(_clip_vit, "b", patch=16, **_CLIP),
  "clip_vit_l14": partial(_clip_vit, "l", patch=14, **_CLIP),
  "clip_vit_l14_336": partial(
    _clip_vit, "l", patch=14, **_CLIP
  ),  # the same, larger images
  "clip_vit_h14": partial(_clip_vit, "h", patch=14, **_LAION),
  "clip_vit_g14": partial(_clip_vit, "g", patch=14, **_LAION),
  "clip_vit_bigg14": partial(_clip_vit, "bigg", patch=14, **_LAION),
  "siglip_b16": partial(_siglip_vit, "b", patch=16),
  "siglip_l16": partial(_siglip_vit, "l", patch=16),
  "siglip_so400m14": partial(_siglip_vit, "so400m", patch=14),
}

TEXT = {
  "text_test": partial(_text, "test", vocab=512),
  "text_small": partial(_text, "small", vocab=512, pool="mean"),  # captions of a demo
  "clip_rn50": partial(_clip_text, "text_b", **_CLIP),
  "clip_rn101": partial(_clip_text, "text_b", **_CLIP),
  "clip_rn50x4": partial(_clip_text, "text_rn50x4", **_CLIP),
  "clip_rn50x16": partial(_clip_text, "text_l", **_CLIP),
  "clip_rn50x64": partial(_clip_text, "text_rn50x64", **_CLIP),
  "clip_vit_b32": partial(_clip_text, "text_b", **_CLIP),
  "clip_vit_b16": partial(_clip_text, "text_b", **_CLIP),
  "clip_vit_l14": partial(_clip_text, "text_l", **_CLIP),
  "clip_vit_l14_336": partial(_clip_text, "text_l", **_CLIP),
  "clip_vit_h14": partial(_clip_text, "text_h", **_LAION),
  "clip_vit_g14": partial(_clip_text, "text_h", **_LAION),
  "clip_vit_bigg14": partial(_clip_text, "text_bigg", **_LAION),
  "siglip_b16": partial(_siglip_text, "b"),
  "siglip_l16": partial(_siglip_text, "l"),
  "siglip_so400m14": partial(_siglip_text, "so400m"),
}


def _built(make, kwargs, where) -> Network:
  try:
    return network(make(**kwargs))
  except TypeError as error:
    if found := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
      raise UnknownKey(f"no key {found[1]!r} in {where}") from error
    raise


def image(name="resnet18", **kwargs) -> Network:
  """An image encoder: `[N, H, W, 3]` float32 in [0, 1] -> features `[N, d]` float32.

  name: a key of `IMAGE`. kwargs for the ResNets of the paper: `width` 1, 2 or 4
  (multiplies every layer), `stem` "imagenet" or "cifar", `zero_last_gamma` (True),
  `dtype` "float32" or "bfloat16" (of the computation only). `resnet_small` takes
  `widths` and `depths` of its stages instead of `width`, and `stem` "patch" and
  "patch4" too.
  kwargs for the transformers: all fields of `vit.ViT` and of `transformer.Encoder`
  (`width`, `depth`, `heads`, `hidden`, `patch`, `pool`, `scan`, `remat`, `dtype`, ...).
  The towers of CLIP and SigLIP end before their linear map into the joint space.
  kwargs for CLIP's ResNets: all fields of `clip_resnet.CLIPResNet`.

  Raises UserError for an unknown name, UnknownKey for an unknown argument.
  """
  if name not in IMAGE:
    raise UserError(f"unknown image encoder {name!r}; there are {', '.join(IMAGE)}")
  return _built(IMAGE[name], kwargs, f"model ({name})")


def text(name="clip_vit_b32", **kwargs) -> Network:
  """A text encoder: int32 and bool `[N, L]` -> features `[N, d]` float32.

      params, stats = network.init(rng, text, text_mask)
      features, stats = network.apply(params, stats, text, text_mask, train=True)

  Inputs are token ids and a mask that is True at real tokens, start and end included.
  The L given to `init` is the longest that `apply` takes.

  name: a key of `TEXT`: the text tower of the model of that name. kwargs: `vocab`, and
  the other fields of `text.Text` and of `transformer.Encoder`. The linear map into the
  joint space is not part of it.

  Raises UserError for an unknown name, UnknownKey for an unknown argument.
  """
  if name not in TEXT:
    raise UserError(f"unknown text encoder {name!r}; there are {', '.join(TEXT)}")
  return _built(TEXT[name], kwargs, f"model.text ({name})")


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
