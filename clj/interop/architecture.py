"""What a model is, from the shapes of its leaves.

Shapes tell the sizes. They do not tell the number of attention heads, the activation,
the epsilon of the layer norms, how texts are pooled and how pixels are normalised:
those are "facts", from the files beside the weights (`beside`) or from the user.
"""

import dataclasses
import math
from typing import NamedTuple

from clj import models
from clj.cli import UserError


class Model(NamedTuple):
  """A model of two towers, wherever it came from.

  leaves: name -> array, layers as "block0", "block1", ...
  method, model: these sections of a config. size: side of its images. crop:
  `data.eval_crop`; 0: squashed. end: id of the token that ends a text, if it is known.
  """

  leaves: dict
  method: dict
  model: dict
  size: int
  crop: float
  end: int | None = None


def heads(tower: str, width: int) -> int:
  """Attention heads of the published models of this width."""
  sixteen = (1152, 1280, 1408, 1536, 1664) if tower == "image" else (1152,)
  return 16 if width in sixteen else max(1, width // 64)


def describe(leaves: dict, facts: dict) -> Model:
  """Finds out what model the leaves are of.

  leaves: name -> anything with a shape, layers as "block0", "block1", ...
  facts: what shapes do not tell, see `beside`.
  Raises ValueError where a tower is missing or the activation unknown.
  """
  shapes = {name: leaf.shape for name, leaf in leaves.items()}
  for tower in ("image", "text"):
    prefix = f"params/{tower}/"
    if not any(name.startswith(prefix) for name in shapes):
      raise UserError(f"there is no {tower} tower; a whole model has two")
  try:
    image, side, cell = _image(shapes, facts["image"])
    text = _text(shapes, facts["text"], like=image["name"])
  except KeyError as error:
    raise UserError(f"there is no {error.args[0]}, which a whole model has") from None
  method = {"name": "clip", "width": _width(shapes)}
  for tower in ("image", "text"):
    kernel, bias = (
      f"params/{tower}_head/{leaf}" in shapes for leaf in ("kernel", "bias")
    )
    method[f"{tower}_head"] = "affine" if bias else "linear" if kernel else "none"
  sigmoid = "params/bias" in shapes
  method |= {"loss": "sigmoid", "max_scale": None} if sigmoid else {"loss": "softmax"}
  model = {"image": image, "text": text}
  # Images may be a little larger than their patches: 384 pixels are 27 times 14.
  size = facts.get("size") or side * cell
  size = size if size // cell == side else side * cell
  return Model(leaves, method, model, size, facts.get("crop", 1.0), facts.get("end"))


def _width(shapes) -> int:
  for tower in ("text", "image"):
    if f"params/{tower}_head/kernel" in shapes:
      return shapes[f"params/{tower}_head/kernel"][1]
  return shapes["params/text/token"][1]


def _encoder(shapes, tower: str, facts: dict) -> dict:
  blocks = f"params/{tower}/encoder/block"
  kernel = shapes[f"{blocks}0/mlp/fc1/kernel"]
  if "activation" not in facts:
    raise UserError(
      "shapes do not tell the activation, and there is no config.json or "
      "open_clip_config.json beside the weights: say it with --activation=quick_gelu "
      "(OpenAI's models) or gelu (most others)"
    )
  numbers = [int(n[len(blocks) :].split("/")[0]) for n in shapes if blocks in n]
  return {
    "width": kernel[0],
    "depth": 1 + max(numbers),
    "heads": facts.get("heads") or heads(tower, kernel[0]),
    "hidden": kernel[1],
    "activation": facts["activation"],
    "eps": facts["eps"],
    "layer_scale": 1e-5 if f"{blocks}0/layer_scale1" in shapes else None,
  }


def _image(shapes, facts: dict) -> tuple[dict, int, int]:
  """The tower, its positions on a side, and the pixels of each."""
  if "params/image/pool/mean_position" in shapes:
    return _resnet(shapes, facts)
  patch = math.isqrt(shapes["params/image/patch/kernel"][0] // 3)
  wanted = _encoder(shapes, "image", facts) | {
    "patch": patch,
    "cls": "params/image/cls" in shapes,
    "pool": "map" if "params/image/map/probe" in shapes else facts.get("pool", "cls"),
    "patch_bias": "params/image/patch/bias" in shapes,
    "pre_norm": "params/image/ln_pre/scale" in shapes,
    "registers": shapes.get("params/image/registers", (0,))[0],
    "mean": facts["mean"],
    "std": facts["std"],
  }
  return closest(models.IMAGE, wanted), shapes["params/image/position"][0], patch


def _resnet(shapes, facts: dict) -> tuple[dict, int, int]:
  blocks = {name.split("/")[2] for name in shapes if name.startswith("params/image/s")}
  depths = [
    len([b for b in blocks if b.startswith(f"stage{s}_")]) for s in (1, 2, 3, 4)
  ]
  wanted = {
    "width": shapes["params/image/conv3/kernel"][-1],
    "depths": tuple(depths),
    "outputs": shapes["params/image/pool/attention/out/kernel"][1],
    "heads": facts.get("heads"),
    "mean": facts["mean"],
    "std": facts["std"],
  }
  return closest(models.IMAGE, wanted), shapes["params/image/pool/position"][0], 32


def _text(shapes, facts: dict, like: str) -> dict:
  wanted = _encoder(shapes, "text", facts) | {
    "vocab": shapes["params/text/token"][0],
    "causal": facts["causal"],
    "pool": facts["pool"],
    "mask_padding": False,
  }
  return closest(models.TEXT, wanted, like)


def towers(model: Model) -> tuple[dict, dict]:
  """All fields of the image tower and of the text tower."""
  found = []
  for tower, registry in (("image", models.IMAGE), ("text", models.TEXT)):
    options = dict(model.model[tower])
    name = options.pop("name")
    if name not in registry:
      raise UserError(f"unknown {tower} encoder {name!r}")
    found.append(resolve(registry[name](**options)))
  return tuple(found)


def resolve(module) -> dict:
  """All fields of a tower and of its encoder, defaults filled in."""
  fields = lambda m: {f.name: getattr(m, f.name) for f in dataclasses.fields(m)}
  found = fields(module)
  if "encoder" in found:
    found |= fields(found.pop("encoder"))
    found["hidden"] = found["hidden"] or 4 * found["width"]
  if "cls" in found and found["cls"] is None:
    found["cls"] = found["pool"] in ("cls", "tokens")
  return found


def closest(registry: dict, wanted: dict, like: str = "") -> dict:
  """The published model with the fewest fields that differ, and those fields.

  like: the name that is taken where several are as close.
  """
  found = {}
  for name, make in registry.items():
    have = resolve(make())
    if wanted.keys() <= have.keys():
      found[name] = {k: v for k, v in wanted.items() if have[k] != v}
  name = min(found, key=lambda name: (len(found[name]), name != like))
  return {"name": name, **found[name]}
