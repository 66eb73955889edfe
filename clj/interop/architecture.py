"""What a model is, from the shapes of its leaves and the file beside its weights.

Shapes tell the sizes. They do not tell the number of attention heads, the activation,
the epsilon of the layer norms, how texts are pooled and how pixels are normalised:
those come from the configuration that the other projects keep beside their weights
("facts" here), or from the layout where every model of it is alike.
"""

import dataclasses
import math

from clj import models

CLIP_PIXELS = {
  "mean": (0.48145466, 0.4578275, 0.40821073),
  "std": (0.26862954, 0.26130258, 0.27577711),
}
SIGLIP_PIXELS = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
HF_ACTIVATIONS = {
  "quick_gelu": "quick_gelu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
}


def hf_facts(layout: str, config: dict, preprocessor: dict) -> dict:
  """What config.json and preprocessor_config.json of Hugging Face say."""
  siglip = layout == "hf_siglip"
  default = {
    "hidden_act": "gelu_pytorch_tanh" if siglip else "quick_gelu",
    "layer_norm_eps": 1e-6 if siglip else 1e-5,
  }
  facts = {"image": {}, "text": {}}
  for tower, heads in (("image", 12), ("text", 12 if siglip else 8)):
    section = config.get({"image": "vision_config"}.get(tower, "text_config")) or {}
    said = default | {"num_attention_heads": heads} | section
    if config:  # what it does not say is a default there
      facts[tower]["heads"] = said["num_attention_heads"]
    if config or siglip:
      if said["hidden_act"] not in HF_ACTIVATIONS:
        raise ValueError(
          f"hidden_act {said['hidden_act']!r} of the {tower} tower is not known here; "
          f"there are {', '.join(HF_ACTIVATIONS)}"
        )
      facts[tower]["activation"] = HF_ACTIVATIONS[said["hidden_act"]]
    facts[tower]["eps"] = said["layer_norm_eps"]
  facts["size"] = (config.get("vision_config") or {}).get("image_size")
  pixels = SIGLIP_PIXELS if siglip else CLIP_PIXELS
  facts["image"] |= {
    "mean": tuple(preprocessor.get("image_mean", pixels["mean"])),
    "std": tuple(preprocessor.get("image_std", pixels["std"])),
  }
  if siglip:
    facts["text"] |= {"causal": False, "pool": "last"}
  else:
    # 2 is a wrong id that stayed in old files; the highest id is meant (and taken).
    text = config.get("text_config") or {}
    highest = text.get("vocab_size", 49408) - 1
    end = text.get("eos_token_id", highest)
    pool = "highest" if end in (2, highest) else "end"
    facts["text"] |= {"causal": True, "pool": pool}
  return facts


def open_clip_facts(layout: str, config: dict, openai: bool) -> dict:
  """What open_clip_config.json says, or that the file is one of OpenAI's."""
  model = config.get("model_cfg", {})
  vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
  pixels = config.get("preprocess_cfg", {})
  siglip = layout == "open_clip_siglip"
  facts = {"image": {}, "text": {}, "size": vision.get("image_size")}
  # SigLIP was trained with the tanh form; open_clip computes the exact one for some.
  quick = "quick_gelu" if model.get("quick_gelu") or openai else "gelu"
  for tower, section in (("image", vision), ("text", text)):
    tanh = (section.get("act_kwargs") or {}).get("approximate") == "tanh"
    if siglip or tanh:
      facts[tower]["activation"] = "gelu_tanh"
    elif model or openai:
      facts[tower]["activation"] = quick
    eps = (section.get("norm_kwargs") or {}).get("eps", 1e-6 if siglip else 1e-5)
    facts[tower]["eps"] = eps
  if isinstance(vision.get("width"), int) and "head_width" in vision:
    facts["image"]["heads"] = vision["width"] // vision["head_width"]
  if "heads" in text:
    facts["text"]["heads"] = text["heads"]
  default = SIGLIP_PIXELS if siglip else CLIP_PIXELS
  for key in ("mean", "std"):
    facts["image"][key] = tuple(pixels.get(key, default[key]))
  pools = {"argmax": "highest", "eos": "end", "last": "last"}
  pool = text.get("pool_type", "last" if siglip else "argmax")
  if pool not in pools:
    raise ValueError(f"text pooling {pool!r} is not known here; {', '.join(pools)} are")
  facts["text"] |= {
    "causal": not text.get("no_causal_mask", siglip),
    "pool": pools[pool],
  }
  if vision.get("pool_type", "tok") == "avg":
    facts["image"]["pool"] = "mean"
  return facts


def heads(tower: str, width: int) -> int:
  """Attention heads of the published models of this width."""
  sixteen = (1152, 1280, 1408, 1536, 1664) if tower == "image" else (1152,)
  return 16 if width in sixteen else max(1, width // 64)


def describe(leaves: dict, facts: dict) -> dict:
  """The sections `method` and `model` of a config, and the images' side "size".

  leaves: name -> anything with a shape, layers as "block0", "block1", ...
  facts: "image" and "text": fields of the towers that shapes do not tell; "size".
  Raises ValueError where the activation is unknown.
  """
  shapes = {name: leaf.shape for name, leaf in leaves.items()}
  for tower in ("image", "text"):
    prefix = f"params/{tower}/"
    if not any(name.startswith(prefix) for name in shapes):
      raise ValueError(f"there is no {tower} tower; a whole model has two")
  image, size = _image(shapes, facts["image"])
  text = _text(shapes, facts["text"], like=image["name"])
  method = {"name": "clip", "width": _width(shapes)}
  for tower in ("image", "text"):
    kernel, bias = (
      f"params/{tower}_head/{leaf}" in shapes for leaf in ("kernel", "bias")
    )
    method[f"{tower}_head"] = "affine" if bias else "linear" if kernel else "none"
  sigmoid = "params/bias" in shapes
  method |= {"loss": "sigmoid", "max_scale": None} if sigmoid else {"loss": "softmax"}
  return {
    "method": method,
    "model": {"image": image, "text": text},
    "size": facts.get("size") or size,
  }


def _width(shapes) -> int:
  for tower in ("text", "image"):
    if f"params/{tower}_head/kernel" in shapes:
      return shapes[f"params/{tower}_head/kernel"][1]
  return shapes["params/text/token"][1]


def _encoder(shapes, tower: str, facts: dict) -> dict:
  blocks = f"params/{tower}/encoder/block"
  kernel = shapes[f"{blocks}0/mlp/fc1/kernel"]
  if "activation" not in facts:
    raise ValueError(
      "shapes do not tell the activation, and there is no config.json or "
      "open_clip_config.json beside the weights: say it with --activation=quick_gelu "
      "(OpenAI's models) or gelu (most others)"
    )
  return {
    "width": kernel[0],
    "depth": 1
    + max(int(n[len(blocks) :].split("/")[0]) for n in shapes if blocks in n),
    "heads": facts.get("heads") or heads(tower, kernel[0]),
    "hidden": kernel[1],
    "activation": facts["activation"],
    "eps": facts["eps"],
    "layer_scale": 1e-5 if f"{blocks}0/layer_scale1" in shapes else None,
  }


def _image(shapes, facts: dict) -> tuple[dict, int]:
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
  return closest(models.IMAGE, wanted), shapes["params/image/position"][0] * patch


def _resnet(shapes, facts: dict) -> tuple[dict, int]:
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
  side = shapes["params/image/pool/position"][0]
  return closest(models.IMAGE, wanted), 32 * side


def _text(shapes, facts: dict, like: str) -> dict:
  wanted = _encoder(shapes, "text", facts) | {
    "vocab": shapes["params/text/token"][0],
    "causal": facts["causal"],
    "pool": facts["pool"],
    "mask_padding": False,
  }
  return closest(models.TEXT, wanted, like)


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
