"""Image and text towers: published sizes, pooling, masks, positions, layouts."""

import jax
import jax.numpy as jnp
import pytest

from clj import models

# Parameters, image side, text length, width of the joint space, whether the heads have
# biases and the loss has one: open_clip 3.3.0 built from the configuration of that name
# (`visual` with its projection, and the whole model).
OPEN_CLIP = {
  "clip_rn50": (38_316_896, 102_007_137, 224, 77, 1024),
  "clip_rn101": (56_259_936, 119_688_033, 224, 77, 512),
  "clip_rn50x4": (87_137_080, 178_300_601, 288, 77, 640),
  "clip_rn50x16": (167_328_912, 290_979_217, 384, 77, 768),
  "clip_rn50x64": (420_380_352, 623_258_305, 448, 77, 1024),
  "clip_vit_b32": (87_849_216, 151_277_313, 224, 77, 512),
  "clip_vit_b16": (86_192_640, 149_620_737, 224, 77, 512),
  "clip_vit_l14": (303_966_208, 427_616_513, 224, 77, 768),
  "clip_vit_l14_336": (304_293_888, 427_944_193, 336, 77, 768),
  "clip_vit_h14": (632_076_800, 986_109_441, 224, 77, 1024),
  "clip_vit_g14": (1_012_645_632, 1_366_678_273, 224, 77, 1024),
  "clip_vit_bigg14": (1_844_907_264, 2_539_567_105, 224, 77, 1280),
  "siglip_b16": (92_884_224, 203_155_970, 224, 64, 768),
  "siglip_l16": (315_956_224, 652_150_786, 256, 64, 1024),
  "siglip_so400m14": (427_680_704, 877_360_306, 224, 16, 1152),
}


def images(side):
  return jax.ShapeDtypeStruct((2, side, side, 3), jnp.float32)


def texts(length):
  shape = (2, length)
  return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, bool)


def sizes(network, *inputs):
  """Number of parameters and width of the features; nothing is computed."""
  params, stats = jax.eval_shape(network.init, jax.random.key(0), *inputs)
  apply = lambda *args: network.apply(*args, train=False)[0]
  features = jax.eval_shape(apply, params, stats, *inputs)
  for leaf in jax.tree.leaves((params, stats, features)):
    assert leaf.dtype == jnp.float32 and not leaf.weak_type
  return sum(leaf.size for leaf in jax.tree.leaves(params)), features.shape[1]


@pytest.mark.parametrize("name", OPEN_CLIP)
def test_parameters_of_open_clip(name):
  visual, total, side, length, joint = OPEN_CLIP[name]
  options = {} if "rn" in name else {"scan": True}  # as many, faster to trace
  image, image_width = sizes(models.image(name, **options), images(side))
  text, text_width = sizes(models.text(name, scan=True), *texts(length))
  text += text_width * joint + 1  # the head, and the scale of the loss
  if name.startswith("siglip"):
    text += joint + 1  # biases of both
  elif "vit" in name:
    image += image_width * joint
  assert image == visual
  assert image + text == total
