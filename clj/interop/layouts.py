"""Whose tensor is which leaf: one table a layout, and one function to read it.

A row of a table names their tensor and our leaf and says how the one is laid out as the
other. "{i}" stands for the number of a layer. PyTorch's linear maps are `[out, in]` and
its convolutions `[out, in, height, width]`; ours are `[in, out]` and `[height, width,
in, out]`. Where one tensor of theirs is several leaves of ours (query, key and value;
the position of the class token and those of the patches) each row has its part of the
first axis, and the parts follow each other in the order of the table. "{i+1}" is that
number counted from one.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

from clj.cli import UserError


class Form(NamedTuple):
  """How a tensor of theirs is laid out as a leaf of ours, and back.

  Both give views, no copies (but for the kernel of the patches, which is small).
  """

  ours: Callable
  theirs: Callable


def _grid(table):
  side = math.isqrt(len(table))
  if side * side != len(table):
    raise UserError(f"a table of {len(table)} positions is not that of square images")
  return table.reshape(side, side, -1)


def _patch_rows(kernel):
  if kernel.ndim == 2:  # SigLIP 2 for any aspect has a linear map there
    return kernel.T
  return kernel.transpose(2, 3, 1, 0).reshape(-1, len(kernel))


def _patch_kernel(kernel):
  side = math.isqrt(len(kernel) // 3)
  return kernel.reshape(side, side, 3, -1).transpose(3, 2, 0, 1)


SAME = Form(lambda x: x, lambda x: x)
LINEAR = Form(lambda x: x.T, lambda x: x.T)
CONV = Form(lambda x: x.transpose(2, 3, 1, 0), lambda x: x.transpose(3, 2, 0, 1))
PATCH = Form(_patch_rows, _patch_kernel)  # [D, 3, P, P] <-> [P * P * 3, D]
GRID = Form(_grid, lambda x: x.reshape(-1, x.shape[-1]))  # [n, D] <-> [h, w, D]
GRID3 = Form(lambda x: _grid(x[0]), lambda x: x.reshape(1, -1, x.shape[-1]))
TOKEN = Form(lambda x: x[0], lambda x: x[None])  # [1, D] <-> [D]
TOKEN3 = Form(lambda x: x[0, 0], lambda x: x[None, None])  # [1, 1, D] <-> [D]
# The scale and the bias have no axis or one of length 1, there as here.
SCALAR = Form(lambda x: x.reshape(()), lambda x: x.reshape(()))
SCALAR1 = Form(lambda x: x.reshape(()), lambda x: x.reshape(1))


def whole(n):
  return slice(None)


def first(n):
  return slice(0, 1)


def rest(n):
  return slice(1, n)


def part(k, of):
  return lambda n: slice(k * n // of, (k + 1) * n // of)


class Row(NamedTuple):
  theirs: str
  ours: str
  form: Form = SAME
  part: Callable = whole


def dense(theirs, ours, part=whole, weight=".weight", bias=".bias"):
  return [
    Row(theirs + weight, f"{ours}/kernel", LINEAR, part),
    Row(theirs + bias, f"{ours}/bias", SAME, part),
  ]


def norm(theirs, ours):
  return [
    Row(f"{theirs}.weight", f"{ours}/scale"),
    Row(f"{theirs}.bias", f"{ours}/bias"),
  ]


def fused(theirs, weight=".weight", bias=".bias"):
  """Query, key and value in one matrix, in this order."""
  names = ("query", "key", "value")
  return [
    row
    for k, name in enumerate(names)
    for row in dense(theirs, f"attention/{name}", part(k, 3), weight, bias)
  ]


def under(theirs, ours, rows):
  return [Row(theirs + row.theirs, ours + row.ours, *row[2:]) for row in rows]


OPEN_CLIP_BLOCK = [
  *norm("ln_1", "ln1"),
  *fused("attn.in_proj", "_weight", "_bias"),
  *dense("attn.out_proj", "attention/out"),
  Row("ls_1.gamma", "layer_scale1"),
  *norm("ln_2", "ln2"),
  *dense("mlp.c_fc", "mlp/fc1"),
  *dense("mlp.c_proj", "mlp/fc2"),
  Row("ls_2.gamma", "layer_scale2"),
]
OPEN_CLIP_TEXT = [
  Row("token_embedding.weight", "params/text/token"),
  Row("positional_embedding", "params/text/position"),
  *under(
    "transformer.resblocks.{i}.", "params/text/encoder/block{i}/", OPEN_CLIP_BLOCK
  ),
  *norm("ln_final", "params/text/ln_post"),
]
OPEN_CLIP_VIT = [
  Row("visual.conv1.weight", "params/image/patch/kernel", PATCH),
  Row("visual.class_embedding", "params/image/cls"),
  Row("visual.positional_embedding", "params/image/cls_position", TOKEN, first),
  Row("visual.positional_embedding", "params/image/position", GRID, rest),
  *norm("visual.ln_pre", "params/image/ln_pre"),
  *under(
    "visual.transformer.resblocks.{i}.",
    "params/image/encoder/block{i}/",
    OPEN_CLIP_BLOCK,
  ),
  *norm("visual.ln_post", "params/image/ln_post"),
  Row("visual.proj", "params/image_head/kernel"),
]


def _batch_norm(theirs, ours):
  """Below params/image/ the scale and bias, below extra/image/ the running averages."""
  return [
    *norm(theirs, f"params/image/{ours}"),
    Row(f"{theirs}.running_mean", f"extra/image/{ours}/mean"),
    Row(f"{theirs}.running_var", f"extra/image/{ours}/var"),
  ]


def _conv_norm(theirs, ours, pairs):
  return [
    row
    for conv, bn, our_conv, our_bn in pairs
    for row in (
      Row(f"{theirs}{conv}.weight", f"params/image/{ours}{our_conv}/kernel", CONV),
      *_batch_norm(f"{theirs}{bn}", f"{ours}{our_bn}"),
    )
  ]


_THREE = [(f"conv{n}", f"bn{n}", f"conv{n}", f"bn{n}") for n in (1, 2, 3)]
_SHORTCUT = [("downsample.0", "downsample.1", "conv_shortcut", "bn_shortcut")]
OPEN_CLIP_RESNET = [
  *_conv_norm("visual.", "", _THREE),
  *(
    row
    for stage in (1, 2, 3, 4)
    for row in _conv_norm(
      f"visual.layer{stage}.{{i}}.",
      f"stage{stage}_block{{i+1}}/",
      _THREE + _SHORTCUT,
    )
  ),
  *under(
    "visual.attnpool.",
    "params/image/pool/",
    [
      Row("positional_embedding", "mean_position", TOKEN, first),
      Row("positional_embedding", "position", GRID, rest),
      *dense("q_proj", "attention/query"),
      *dense("k_proj", "attention/key"),
      *dense("v_proj", "attention/value"),
      *dense("c_proj", "attention/out"),
    ],
  ),
]
TEMPERATURE = [
  Row("logit_scale", "params/log_scale", SCALAR),
  Row("logit_bias", "params/bias", SCALAR),
]
PROJECTION = [Row("text_projection", "params/text_head/kernel")]

HF_BLOCK = [
  *norm("layer_norm1", "ln1"),
  *dense("self_attn.q_proj", "attention/query"),
  *dense("self_attn.k_proj", "attention/key"),
  *dense("self_attn.v_proj", "attention/value"),
  *dense("self_attn.out_proj", "attention/out"),
  *norm("layer_norm2", "ln2"),
  *dense("mlp.fc1", "mlp/fc1"),
  *dense("mlp.fc2", "mlp/fc2"),
]
HF_TOWERS = [
  Row("text_model.embeddings.token_embedding.weight", "params/text/token"),
  Row("text_model.embeddings.position_embedding.weight", "params/text/position"),
  *under("text_model.encoder.layers.{i}.", "params/text/encoder/block{i}/", HF_BLOCK),
  *norm("text_model.final_layer_norm", "params/text/ln_post"),
  Row(
    "vision_model.embeddings.patch_embedding.weight", "params/image/patch/kernel", PATCH
  ),
  *under(
    "vision_model.encoder.layers.{i}.", "params/image/encoder/block{i}/", HF_BLOCK
  ),
  *norm("vision_model.post_layernorm", "params/image/ln_post"),
]
VISION = "vision_model.embeddings"
HF_CLIP = [
  *HF_TOWERS,
  Row(f"{VISION}.class_embedding", "params/image/cls"),
  Row(f"{VISION}.position_embedding.weight", "params/image/cls_position", TOKEN, first),
  Row(f"{VISION}.position_embedding.weight", "params/image/position", GRID, rest),
  *norm("vision_model.pre_layrnorm", "params/image/ln_pre"),  # their spelling
  Row("visual_projection.weight", "params/image_head/kernel", LINEAR),
  Row("text_projection.weight", "params/text_head/kernel", LINEAR),
  Row("logit_scale", "params/log_scale", SCALAR),
]
HF_SIGLIP = [
  *HF_TOWERS,
  Row(f"{VISION}.patch_embedding.bias", "params/image/patch/bias"),
  Row(f"{VISION}.position_embedding.weight", "params/image/position", GRID),
  Row("vision_model.head.probe", "params/image/map/probe", TOKEN3),
  *under(
    "vision_model.head.",
    "params/image/map/",
    [
      *fused("attention.in_proj", "_weight", "_bias"),
      *dense("attention.out_proj", "attention/out"),
      *norm("layernorm", "ln"),
      *dense("mlp.fc1", "mlp/fc1"),
      *dense("mlp.fc2", "mlp/fc2"),
    ],
  ),
  *dense("text_model.head", "params/text_head"),
  Row("logit_scale", "params/log_scale", SCALAR1),
  Row("logit_bias", "params/bias", SCALAR1),
]

# A ViT of timm that begins with its position table, as SigLIP's towers are.
TIMM_VIT = [
  Row("patch_embed.proj.weight", "patch/kernel", PATCH),
  Row("patch_embed.proj.bias", "patch/bias"),
  Row("pos_embed", "position", GRID3),
  *under(
    "blocks.{i}.",
    "encoder/block{i}/",
    [
      *norm("norm1", "ln1"),
      *fused("attn.qkv"),
      *dense("attn.proj", "attention/out"),
      Row("ls1.gamma", "layer_scale1"),
      *norm("norm2", "ln2"),
      *dense("mlp.fc1", "mlp/fc1"),
      *dense("mlp.fc2", "mlp/fc2"),
      Row("ls2.gamma", "layer_scale2"),
    ],
  ),
  *norm("norm", "ln_post"),
  Row("attn_pool.latent", "map/probe", TOKEN3),
  *dense("attn_pool.q", "map/attention/query"),
  *dense("attn_pool.kv", "map/attention/key", part(0, 2)),
  *dense("attn_pool.kv", "map/attention/value", part(1, 2)),
  *dense("attn_pool.proj", "map/attention/out"),
  *norm("attn_pool.norm", "map/ln"),
  *dense("attn_pool.mlp.fc1", "map/mlp/fc1"),
  *dense("attn_pool.mlp.fc2", "map/mlp/fc2"),
]

# OpenAI has the text tower at the top, open_clip's newer models have it under "text.".
# SigLIP's projection is a linear map with a bias, CLIP's is a matrix.
LAYOUTS = {
  "open_clip": [*OPEN_CLIP_VIT, *OPEN_CLIP_TEXT, *PROJECTION, *TEMPERATURE],
  "open_clip_resnet": [*OPEN_CLIP_RESNET, *OPEN_CLIP_TEXT, *PROJECTION, *TEMPERATURE],
  "open_clip_custom_text": [
    *OPEN_CLIP_VIT,
    *under("text.", "", [*OPEN_CLIP_TEXT, *PROJECTION]),
    *TEMPERATURE,
  ],
  "open_clip_siglip": [
    *under("visual.trunk.", "params/image/", TIMM_VIT),
    *under("text.", "", OPEN_CLIP_TEXT),
    *dense("text.text_projection", "params/text_head"),
    *TEMPERATURE,
  ],
  "hf_clip": HF_CLIP,
  "hf_siglip": HF_SIGLIP,
}

# Tensors without a weight in them: buffers, and the scalars of OpenAI's files.
DROPPED = re.compile(
  r"position_ids$|num_batches_tracked$|^(input_resolution|context_length|vocab_size)$"
)

# Leaves that are part of a model, not of the run that trained it.
OF_MODEL = re.compile(
  r"params/((image|text|image_head|text_head)/|log_scale$|bias$)|extra/(image|text)/"
)


def matches(rows, names, back: bool = False):
  """Yields (row, name, its name on the other side) for every name that a row has.

  names: of their tensors, or with `back` of our leaves.
  """
  names = set(names)
  for row in rows:
    old, new = (row.ours, row.theirs) if back else (row.theirs, row.ours)
    if not (number := re.search(r"\{i(\+1)?\}", old)):
      if old in names:
        yield row, old, new
      continue
    before, after = map(re.escape, old.split(number[0]))
    pattern = re.compile(rf"{before}(\d+){after}")
    for name in names:
      if match := pattern.fullmatch(name):
        i = int(match[1]) - bool(number[1])
        yield row, name, new.replace("{i}", str(i)).replace("{i+1}", str(i + 1))


def exchange(layout: str, source: dict, back: bool = False) -> tuple[dict, list[str]]:
  """Reads a table: their tensors -> our leaves, or with `back` the other way.

  source: name -> array; our layers are "block0", "block1", ... here.
  Returns name -> list of arrays, views of the source that follow each other along the
  first axis (several only with `back`), and the names that no row of the table has.
  """
  found, explained = {}, set()
  for row, name, goal in matches(LAYOUTS[layout], source, back):
    value = source[name]
    try:
      if not back and row.part is not whole:
        value = value[row.part(len(value))]
      value = row.form.theirs(value) if back else row.form.ours(value)
    except (ValueError, IndexError, TypeError) as error:
      shape = source[name].shape
      raise UserError(f"{layout}: {name} has shape {shape}: {error}") from None
    found.setdefault(goal, []).append(value)
    explained.add(name)
  return found, [name for name in source if name not in explained]


def recognise(names) -> str | None:
  """The layout that explains most of the tensors' names; None if none has any."""
  explained = {
    layout: len({name for _, name, _ in matches(rows, names)})
    for layout, rows in LAYOUTS.items()
  }
  best = max(explained, key=explained.get)
  return best if explained[best] else None


def missing(layout: str, names) -> list[str]:
  """Tensors that a whole model has in a layout, but that are not among the names."""
  optional = re.compile(r"visual\.ln_pre\.|logit_bias$" if layout[0] == "o" else r"$^")
  return [
    row.theirs
    for row in LAYOUTS[layout]
    if "{" not in row.theirs
    and row.theirs not in names
    and not optional.match(row.theirs)
  ]
