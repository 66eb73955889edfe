"""The files that other projects keep beside their weights, read and written.

Read, they give "facts": what the shapes of a model do not tell.

    {"image": {"activation", "eps", "heads", "mean", "std", "pool"}, "text": {...},
     "size": side of the images, "crop": `data.eval_crop`}

A key is absent where nothing is known.
"""

import json

from etils import epath

from clj.cli import UserError
from clj.interop.architecture import Model, towers

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


# Their names of text pooling. The highest id is the end token in CLIP's vocabulary.
OPEN_CLIP_POOLS = {"argmax": "highest", "eos": "end", "last": "last"}


def facts(layout: str, directory, openai: bool = False) -> dict:
  """What the files in a directory say of the weights in it.

  openai: the weights are in a file of OpenAI's own, which has no other beside it.
  """
  read = lambda name: _json(epath.Path(directory) / name)
  if layout.startswith("hf"):
    siglip = layout == "hf_siglip"
    return _hf_facts(siglip, read("config.json"), read("preprocessor_config.json"))
  siglip = layout == "open_clip_siglip"
  return _open_clip_facts(siglip, read("open_clip_config.json"), openai)


def _json(path: epath.Path) -> dict:
  try:
    return json.loads(path.read_text()) if path.exists() else {}
  except ValueError as error:
    raise UserError(f"{path}: no JSON: {error}") from None


def _hf_facts(siglip: bool, config: dict, preprocessor: dict) -> dict:
  vision, text = config.get("vision_config") or {}, config.get("text_config") or {}
  found = {"image": {}, "text": {}, "size": vision.get("image_size")}
  act, eps = ("gelu_pytorch_tanh", 1e-6) if siglip else ("quick_gelu", 1e-5)
  heads = {"image": 12, "text": 12 if siglip else 8}
  for tower, section in (("image", vision), ("text", text)):
    found[tower]["eps"] = section.get("layer_norm_eps", eps)
    if config:  # what it does not say is the default of their classes
      found[tower]["heads"] = section.get("num_attention_heads", heads[tower])
    if config or siglip:
      name = section.get("hidden_act", act)
      if name not in HF_ACTIVATIONS:
        raise UserError(
          f"hidden_act {name!r} of the {tower} tower is not known here; there are "
          f"{', '.join(HF_ACTIVATIONS)}"
        )
      found[tower]["activation"] = HF_ACTIVATIONS[name]
  pixels = SIGLIP_PIXELS if siglip else CLIP_PIXELS
  for key in ("mean", "std"):
    found["image"][key] = tuple(preprocessor.get(f"image_{key}", pixels[key]))
  if siglip:
    return found | {
      "text": found["text"] | {"causal": False, "pool": "last"},
      "crop": 0.0,
    }
  resized = (preprocessor.get("size") or {}, preprocessor.get("crop_size") or {})
  if {"shortest_edge", "height"} <= resized[0].keys() | resized[1].keys():
    found["crop"] = resized[1]["height"] / resized[0]["shortest_edge"]
  # 2 is a wrong id that stayed in old files: transformers takes the highest id then.
  highest = text.get("vocab_size", 49408) - 1
  end = text.get("eos_token_id", highest)
  found["text"] |= {"causal": True, "pool": "highest" if end == 2 else "end"}
  if end == highest:
    found["text"]["pool"] = "highest"
  return found | ({} if end == 2 else {"end": end})


def _open_clip_facts(siglip: bool, config: dict, openai: bool) -> dict:
  model = config.get("model_cfg", {})
  vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
  pixels = config.get("preprocess_cfg", {})
  found = {"image": {}, "text": {}, "size": vision.get("image_size")}
  squash = pixels.get("resize_mode", "squash" if siglip else "shortest") == "squash"
  found["crop"] = 0.0 if squash else 1.0
  for tower, section in (("image", vision), ("text", text)):
    eps = 1e-6 if siglip else 1e-5
    found[tower]["eps"] = (section.get("norm_kwargs") or {}).get("eps", eps)
    # SigLIP was trained with the tanh form; open_clip computes the exact one for some.
    if siglip or (section.get("act_kwargs") or {}).get("approximate") == "tanh":
      found[tower]["activation"] = "gelu_tanh"
    elif model or openai:
      quick = openai or model.get("quick_gelu")
      found[tower]["activation"] = "quick_gelu" if quick else "gelu"
  if isinstance(vision.get("width"), int) and "head_width" in vision:
    found["image"]["heads"] = vision["width"] // vision["head_width"]
  if "heads" in text:
    found["text"]["heads"] = text["heads"]
  default = SIGLIP_PIXELS if siglip else CLIP_PIXELS
  for key in ("mean", "std"):
    found["image"][key] = tuple(pixels.get(key, default[key]))
  if vision.get("pool_type", "tok") == "avg":
    found["image"]["pool"] = "mean"
  pool = text.get("pool_type", "last" if siglip else "argmax")
  if pool not in OPEN_CLIP_POOLS:
    raise UserError(
      f"text pooling {pool!r} is not known here; there are {', '.join(OPEN_CLIP_POOLS)}"
    )
  if pool == "eos":
    found["end"] = text.get("eos_id", 2)
  found["text"] |= {
    "causal": not text.get("no_causal_mask", siglip),
    "pool": OPEN_CLIP_POOLS[pool],
  }
  return found


def files(layout: str, model: Model) -> dict[str, dict]:
  """The files, by name, that go with the model in a layout.

  Raises ValueError for what the other project's classes cannot compute.
  """
  image, text = towers(model)
  if layout.startswith("hf"):
    return _hf_files(layout, model, image, text)
  return _open_clip_files(layout, model, image, text)


def _hf_files(layout: str, model: Model, image: dict, text: dict) -> dict[str, dict]:
  siglip, size = layout == "hf_siglip", model.size
  _require(layout, "image tower's pool", image["pool"], "map" if siglip else "cls")
  _require(layout, "text tower's causal", text["causal"], not siglip)
  pools = ("last",) if siglip else ("highest", "end")
  _require(layout, "text tower's pool", text["pool"], *pools)
  _refuse_masked_padding(layout, text)
  names = {ours: theirs for theirs, ours in HF_ACTIVATIONS.items()}

  def tower(fields):
    return {
      "hidden_size": fields["width"],
      "intermediate_size": fields["hidden"],
      "num_hidden_layers": fields["depth"],
      "num_attention_heads": fields["heads"],
      "hidden_act": names[fields["activation"]],
      "layer_norm_eps": fields["eps"],
    }

  # transformers takes the highest id where the end token is said to be 2.
  legacy = text["pool"] == "highest" and model.end is None
  end = 2 if legacy else text["vocab"] - 1 if model.end is None else model.end
  kind = "siglip" if siglip else "clip"
  texts = tower(text) | {
    "model_type": f"{kind}_text_model",
    "vocab_size": text["vocab"],
    "max_position_embeddings": len(model.leaves["params/text/position"]),
    "eos_token_id": end,
  }
  images = tower(image) | {
    "model_type": f"{kind}_vision_model",
    "image_size": size,
    "patch_size": image["patch"],
  }
  config = {
    "architectures": ["SiglipModel" if siglip else "CLIPModel"],
    "model_type": kind,
    "text_config": texts,
    "vision_config": images,
  }
  width = model.method["width"]
  if siglip:
    texts["projection_size"] = width
  else:
    config["projection_dim"] = texts["projection_dim"] = width
    images["projection_dim"] = width
  square = {"height": size, "width": size}
  cut = {"size": square}
  if model.crop:
    shortest = {"shortest_edge": round(size / model.crop)}
    cut = {"size": shortest, "do_center_crop": True, "crop_size": square}
  processor = cut | {
    "image_processor_type": f"{'Siglip' if siglip else 'CLIP'}ImageProcessor",
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": list(image["mean"]),
    "image_std": list(image["std"]),
  }
  return {"config.json": config, "preprocessor_config.json": processor}


# timm's names of SigLIP's image towers: by width, depth and patch, and their sizes.
TIMM_SIGLIP = {
  (768, 12, 32): ("vit_base_patch32_siglip", (256,)),
  (768, 12, 16): ("vit_base_patch16_siglip", (224, 256, 384, 512)),
  (1024, 24, 16): ("vit_large_patch16_siglip", (256, 384, 512)),
  (1152, 27, 14): ("vit_so400m_patch14_siglip", (224, 378, 384)),
  (1152, 27, 16): ("vit_so400m_patch16_siglip", (256, 384, 512)),
  (1536, 40, 16): ("vit_giantopt_patch16_siglip", (256, 384)),
}


def _open_clip_files(layout: str, model: Model, image, text) -> dict[str, dict]:
  resnet, siglip = layout == "open_clip_resnet", layout == "open_clip_siglip"
  size = model.size
  pools = {ours: theirs for theirs, ours in OPEN_CLIP_POOLS.items()}
  _require(layout, "text tower's pool", text["pool"], *pools)
  _refuse_masked_padding(layout, text)
  texts = {
    "context_length": len(model.leaves["params/text/position"]),
    "vocab_size": text["vocab"],
    "width": text["width"],
    "heads": text["heads"],
    "layers": text["depth"],
    "mlp_ratio": _ratio(text),
    "norm_kwargs": {"eps": text["eps"]},
    "pool_type": pools[text["pool"]],
  }
  if text["pool"] == "end":
    texts["eos_id"] = text["vocab"] - 1 if model.end is None else model.end
  if not text["causal"]:
    texts["no_causal_mask"] = True
  if siglip:
    key = (image["width"], image["depth"], image["patch"])
    name, sizes = TIMM_SIGLIP.get(key, ("", ()))
    if size not in sizes:
      raise UserError(
        f"{layout}: timm has no tower of width, depth, patch {key} for images of {size}"
      )
    texts["proj_bias"] = True
    vision = {
      "timm_model_name": f"{name}_{size}",
      "timm_model_pretrained": False,
      "timm_pool": "map",
      "timm_proj": "none",
    }
  elif resnet:
    vision = {"layers": list(image["depths"]), "width": image["width"]}
    vision["patch_size"] = None
  else:
    _require(layout, "image tower's pool", image["pool"], "cls")
    vision = {
      "layers": image["depth"],
      "width": image["width"],
      "head_width": image["width"] // image["heads"],
      "mlp_ratio": _ratio(image),
      "patch_size": image["patch"],
      "norm_kwargs": {"eps": image["eps"]},
      "no_ln_pre": not image["pre_norm"],
    }
  act = {text["activation"], image.get("activation", text["activation"])}
  if "quick_gelu" in act:
    _require(layout, "activation", sorted(act), ["quick_gelu"])
  for section, fields in ((texts, text), (vision, image)):
    if fields.get("activation") == "gelu_tanh" and "timm_model_name" not in section:
      section["act_kwargs"] = {"approximate": "tanh"}
  config = {
    "embed_dim": model.method["width"],
    "quick_gelu": "quick_gelu" in act,
    "vision_cfg": {"image_size": size, **vision},
    "text_cfg": texts,
  }
  if layout != "open_clip" and not resnet:
    config["custom_text"] = True
  if "params/bias" in model.leaves:
    config["init_logit_bias"] = -10
  pixels = {
    "size": size,
    "mode": "RGB",
    "mean": list(image["mean"]),
    "std": list(image["std"]),
    "interpolation": "bicubic",
    "resize_mode": "shortest" if model.crop else "squash",
  }
  return {"open_clip_config.json": {"model_cfg": config, "preprocess_cfg": pixels}}


def _ratio(tower: dict) -> float:
  """So that open_clip, which rounds width * ratio down, gets the hidden width."""
  exact = tower["hidden"] / tower["width"]
  rounded = int(tower["width"] * exact)
  return exact if rounded == tower["hidden"] else exact + 0.5 / tower["width"]


def _require(layout: str, what: str, value, *possible):
  if value not in possible:
    raise UserError(
      f"{layout} has no place for {what} {value!r}, only for "
      f"{', '.join(map(repr, possible))}"
    )


def _refuse_masked_padding(layout: str, text: dict):
  # A causal model's end token sees no padding anyway.
  if text["mask_padding"] and not text["causal"]:
    raise UserError(f"{layout} has no place for a text tower with mask_padding")
