"""Image and text towers: published sizes, pooling, masks, positions, layouts."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from clj import models, sharding
from clj.models.vit import resize_positions, sincos2d

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


IMAGES = np.random.default_rng(0).uniform(size=(4, 32, 32, 3)).astype(np.float32)
TEXTS = np.random.default_rng(1).integers(1, 500, (4, 7)).astype(np.int32)
MASK = np.arange(7)[None] < np.array([7, 3, 1, 5])[:, None]


def start(network, *inputs):
  """Parameters that are nowhere zero."""

  @jax.jit
  def init(*inputs):
    params, stats = network.init(jax.random.key(0), *inputs)
    assert not stats
    return jax.tree.map(
      lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), params
    )

  return init(*inputs)


def features(network, params, *inputs, train=False, seed=0):
  @jax.jit
  def apply(params, rng, *inputs):
    return network.apply(params, {}, *inputs, train=train, rng=rng)[0]

  return np.asarray(apply(params, jax.random.key(seed), *inputs))


def run(network, *inputs):
  params = start(network, *inputs)
  return params, features(network, params, *inputs)


# The same in float64 and NumPy.


def norm(p, x, eps):
  x = x - x.mean(-1, keepdims=True)
  return (
    x / np.sqrt(np.square(x).mean(-1, keepdims=True) + eps) * p["scale"] + p["bias"]
  )


def dense(p, x):
  return x @ p["kernel"] + p.get("bias", 0.0)


def attention(p, x, context, heads, mask):
  y = np.zeros(x.shape)
  d = x.shape[-1] // heads
  for h in range(heads):
    q, k, v = (
      dense(p[key], z)[..., h * d : (h + 1) * d]
      for key, z in (("query", x), ("key", context), ("value", context))
    )
    scores = np.where(mask, q @ k.swapaxes(1, 2) / np.sqrt(d), -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y[..., h * d : (h + 1) * d] = weights / weights.sum(-1, keepdims=True) @ v
  return dense(p["out"], y)


def gelu(x):
  return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def quick_gelu(x):
  return x / (1 + np.exp(-1.702 * x))


def gelu_tanh(x):
  return x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))) / 2


def mlp(p, x, activation):
  return dense(p["fc2"], activation(dense(p["fc1"], x)))


def encoder(p, x, heads, eps, activation, mask=True):
  for i in range(len(p)):
    q = p[f"block{i}"]
    y = norm(q["ln1"], x, eps)
    x = x + attention(q["attention"], y, y, heads, mask)
    x = x + mlp(q["mlp"], norm(q["ln2"], x, eps), activation)
  return x


def double(tree):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def split(images, size):
  n, side = len(images), images.shape[1] // size
  cells = [
    images[:, size * r : size * (r + 1), size * c : size * (c + 1)].reshape(n, 1, -1)
    for r in range(side)
    for c in range(side)
  ]
  return np.concatenate(cells, axis=1)


def test_clip_image_tower_in_float64():
  mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
  size = {"width": 16, "depth": 2, "heads": 2, "patch": 8, "mean": mean, "std": std}
  params, found = run(models.image("clip_vit_b32", **size), IMAGES)
  p = double(params)
  x = dense(p["patch"], split((IMAGES - mean) / std, 8)) + p["position"].reshape(16, 16)
  cls = np.broadcast_to(p["cls"] + p["cls_position"], (4, 1, 16))
  x = norm(p["ln_pre"], np.concatenate([cls, x], axis=1), 1e-5)
  x = norm(p["ln_post"], encoder(p["encoder"], x, 2, 1e-5, quick_gelu)[:, 0], 1e-5)
  np.testing.assert_allclose(found, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pool", ["map", "mean"])
def test_siglip_image_tower_in_float64(pool):
  size = {"width": 16, "depth": 1, "heads": 2, "patch": 8, "pool": pool}
  params, found = run(models.image("siglip_b16", **size), IMAGES)
  p = double(params)
  x = dense(p["patch"], split(IMAGES, 8)) + p["position"].reshape(16, 16)
  x = norm(p["ln_post"], encoder(p["encoder"], x, 2, 1e-6, gelu_tanh), 1e-6)
  if pool == "mean":
    x = x.mean(1)
  else:
    probe = np.broadcast_to(p["map"]["probe"], (4, 1, 16))
    x = attention(p["map"]["attention"], probe, x, 2, True)
    x = x + mlp(p["map"]["mlp"], norm(p["map"]["ln"], x, 1e-6), gelu_tanh)
    x = x[:, 0]
  np.testing.assert_allclose(found, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
  "pool, causal, padding",
  [
    ("highest", True, False),  # CLIP
    ("last", False, False),  # SigLIP
    ("end", True, True),
    ("mean", False, True),
  ],
)
def test_text_tower_in_float64(pool, causal, padding):
  options = {"pool": pool, "causal": causal, "mask_padding": padding}
  params, found = run(models.text("text_test", **options), TEXTS, MASK)
  p = double(params)
  mask = np.ones((4, 7, 7), bool)
  if causal:
    mask &= np.arange(7)[None] <= np.arange(7)[:, None]
  if padding:
    mask &= MASK[:, None]
  x = encoder(p["encoder"], p["token"][TEXTS] + p["position"], 2, 1e-6, gelu, mask)
  x = norm(p["ln_post"], x, 1e-6)
  if pool == "mean":
    x = [y[:n].mean(0) for y, n in zip(x, (7, 3, 1, 5))]
  else:
    index = {"highest": TEXTS.argmax(1), "end": [6, 2, 0, 4], "last": [6] * 4}[pool]
    x = x[np.arange(4), index]
  np.testing.assert_allclose(found, x, rtol=0, atol=1e-5)


def test_what_text_features_depend_on():
  """The end token of a causal tower sees nothing later; padding can be hidden."""
  other = np.where(MASK, TEXTS, 17)

  def same(**options):
    network = models.text("text_test", **options)
    params, x = run(network, TEXTS, MASK)
    y = features(network, params, other, MASK)
    return np.allclose(x, y, rtol=0, atol=1e-6)

  assert same(pool="end", causal=True, mask_padding=False)
  assert same(pool="end") and same(pool="mean")
  assert not same(pool="end", mask_padding=False)


def test_end_token_of_the_clip_vocabulary():
  """Zero-padded CLIP tokens: the highest id is the end, wherever the mask stops."""
  text = np.zeros((2, 7), np.int32)
  text[0, :4], text[1] = [510, 3, 4, 511], [510, 5, 6, 7, 8, 9, 511]
  network = models.text("text_test", causal=True, mask_padding=False, pool="highest")
  params, x = run(network, text, text > 0)
  network = models.text("text_test", causal=True, mask_padding=False, pool="end")
  y = features(network, params, text, text > 0)
  np.testing.assert_allclose(x, y, rtol=0, atol=1e-6)


def stack(params):
  blocks = params["encoder"]
  blocks = [blocks[f"block{i}"] for i in range(len(blocks))]
  return params | {
    "encoder": {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *blocks)}
  }


def test_scan_and_remat_change_nothing():
  """Value and gradient, parameters stacked along a leading layer axis or not."""
  options = {"depth": 2, "layer_scale": 0.5}
  params, _ = run(models.image("vit_test", **options), IMAGES)

  @jax.jit
  def gradients(params):
    def loss(params, **more):
      network = models.image("vit_test", **options, **more)
      return (network.apply(params, {}, IMAGES, train=True)[0] ** 2).sum()

    plain = jax.value_and_grad(loss)(params)
    remat = jax.value_and_grad(loss)(params, remat=True)
    scan = jax.value_and_grad(loss)(stack(params), scan=True)
    both = jax.value_and_grad(loss)(stack(params), scan=True, remat="dots")
    value, grad = plain
    return (value, stack(grad)), ((remat[0], stack(remat[1])), scan, both)

  expected, found = gradients(params)
  for other in found:
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      other,
      expected,
    )
  fresh, _ = jax.eval_shape(
    models.image("vit_test", scan=True, **options).init, jax.random.key(0), IMAGES
  )
  assert jax.tree.map(jnp.shape, fresh) == jax.tree.map(jnp.shape, stack(params))


def test_scanned_layers_start_different():
  params, _ = jax.jit(models.image("vit_test", scan=True).init)(
    jax.random.key(0), IMAGES
  )
  kernel = params["encoder"]["blocks"]["mlp"]["fc1"]["kernel"]
  assert float(jnp.abs(kernel[0] - kernel[1]).min()) > 0


def test_remat_keeps_less():
  """Of what the forward pass leaves for the backward one."""
  x = jnp.ones((8, 32, 32, 3))

  def kept(**options):
    network = models.image("vit_test", depth=6, **options)
    params, _ = jax.eval_shape(network.init, jax.random.key(0), x)
    forward = lambda params: jax.vjp(
      lambda params: network.apply(params, {}, x, train=True)[0], params
    )[1]
    saved = jax.eval_shape(forward, params)
    return sum(leaf.size for leaf in jax.tree.leaves(saved))

  assert kept(remat=True) < kept() / 3
  assert kept(remat=True, scan=True) < kept(scan=True) / 3
  assert kept(remat=True) < kept(remat="dots") < kept() / 1.5


@pytest.mark.parametrize("tower", ["image", "text"])
def test_bfloat16(tower):
  """Parameters, softmax and features stay float32; products become bfloat16."""
  make, inputs = {
    "image": (lambda **k: models.image("vit_test", **k), (IMAGES,)),
    "text": (lambda **k: models.text("text_test", **k), (TEXTS, MASK)),
  }[tower]
  params, wide = run(make(), *inputs)
  network = make(dtype="bfloat16")
  fresh, _ = jax.eval_shape(network.init, jax.random.key(0), *inputs)
  assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
  apply = jax.jit(lambda params: network.apply(params, {}, *inputs, train=False)[0])
  narrow = apply(params)
  assert narrow.dtype == jnp.float32 and not np.array_equal(narrow, wide)
  assert np.sqrt(np.square(narrow - wide).mean()) < 0.02 * wide.std()
  text = apply.lower(params).as_text()
  products = re.findall(r"dot_general .*-> tensor<[0-9x]*(\w+)>", text)
  assert set(products) == {"bf16"}
  for operation in ("exponential", "rsqrt", "reduce"):
    kinds = re.findall(rf"stablehlo.{operation}\b.*tensor<[0-9x]*(\w+)>", text)
    assert kinds and "bf16" not in kinds


def test_layer_norm_far_from_zero():
  """A mean of many standard deviations does not eat the variance."""
  network = models.text("text_test", depth=0, pool="last")
  params = start(network, TEXTS, MASK)
  rng = np.random.default_rng(0)
  x = (1000.0 + 0.1 * rng.normal(size=(512, 16))).astype(np.float32)
  params |= {"token": jnp.asarray(x), "position": jnp.zeros((7, 16))}
  found = features(network, params, TEXTS, MASK)
  x = x[TEXTS[:, -1]].astype(np.float64)
  expected = norm(double(params["ln_post"]), x, 1e-6)
  np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3)


def test_sine_cosine_positions():
  x = np.asarray(sincos2d(3, 5, 16))
  assert x.shape == (3, 5, 16)
  frequency = 10_000.0 ** -(np.arange(4) / 4)
  expected = [f(z * frequency) for z in (2, 4) for f in (np.sin, np.cos)]
  np.testing.assert_allclose(x[2, 4], np.concatenate(expected), rtol=0, atol=1e-6)
  network = models.image("vit_test", positions="sincos2d")
  params, small = run(network, IMAGES)
  assert "position" not in params and "cls_position" not in params
  wide = np.concatenate([IMAGES, IMAGES], axis=2)
  assert features(network, params, wide).shape == small.shape


def test_learned_positions_are_resized():
  """The grid is that of `init`; other images get it resized."""
  network = models.image("vit_test")
  params = start(network, IMAGES)
  assert params["position"].shape == (4, 4, 16)
  large = jax.image.resize(IMAGES, (4, 64, 48, 3), "linear")
  found = features(network, params, large)
  resized = params | {"position": resize_positions(params["position"], 8, 6)}
  expected = features(network, resized, large)
  np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)

  ramp = jnp.arange(16.0)[:, None, None] + jnp.zeros((16, 16, 1))
  inner = resize_positions(ramp, 32, 16)[6:-6, 8, 0]  # away from the edges
  np.testing.assert_allclose(inner, jnp.arange(6, 26) / 2 - 0.25, rtol=0, atol=1e-4)
  checks = (jnp.arange(16) % 2)[:, None, None] + jnp.zeros((16, 16, 1))
  inner = resize_positions(checks, 4, 4)[1:3, 1:3]  # antialiased: no stripe survives
  np.testing.assert_allclose(inner, 0.5, rtol=0, atol=0.05)
  assert resize_positions(ramp, 16, 16) is ramp


def test_clip_resnet():
  """Blocks start as their shortcuts; positions are resized for other images."""
  size = {"width": 8, "depths": (1, 1), "outputs": 6, "heads": 2}
  network = models.image("clip_rn50", **size)
  large = jax.image.resize(IMAGES, (4, 48, 64, 3), "linear")

  @jax.jit
  def go():
    params, stats = network.init(jax.random.key(0), IMAGES)
    apply = lambda x, train: network.apply(params, stats, x, train=train)
    return params, stats, apply(IMAGES, True), apply(large, False)

  params, stats, (small, new), (other, same) = go()
  assert small.shape == other.shape == (4, 6)
  assert params["pool"]["position"].shape == (4, 4, 64)
  np.testing.assert_array_equal(params["stage2_block1"]["bn3"]["scale"], 0.0)
  assert float(jnp.abs(small - small[:1]).max()) > 1e-3
  moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), stats, new)
  assert min(jax.tree.leaves(moved)) > 0
  jax.tree.map(np.testing.assert_array_equal, stats, same)


def test_patch_dropout():
  """In training, other patches in every example; all of them otherwise."""
  network = models.image("vit_test", patch_dropout=0.5, pool="tokens", depth=0)
  params, whole = run(network, IMAGES)
  assert whole.shape == (4, 1 + 16, 16)

  dropped = lambda seed: features(network, params, IMAGES, train=True, seed=seed)
  some = dropped(0)
  assert some.shape == (4, 1 + 8, 16)
  np.testing.assert_array_equal(some[:, 0], whole[:, 0])
  kept = [
    [int(np.abs(whole[i, 1:] - token).sum(1).argmin()) for token in some[i, 1:]]
    for i in range(4)
  ]
  for i in range(4):
    assert len(set(kept[i])) == 8
    np.testing.assert_array_equal(some[i, 1:], whole[i, 1:][kept[i]])
  assert len({tuple(sorted(row)) for row in kept}) > 1
  np.testing.assert_array_equal(some, dropped(0))
  assert not np.array_equal(some, dropped(1))


def test_token_dropout():
  """Hidden tokens count as padding; a text keeps its ends, and evaluation all of it."""
  drop = lambda share: models.text("text_test", pool="mean", token_dropout=share)
  params, whole = run(drop(0.5), TEXTS, MASK)
  some = lambda share, seed=0: features(
    drop(share), params, TEXTS, MASK, train=True, seed=seed
  )
  np.testing.assert_array_equal(some(0.0), whole)
  last = MASK.sum(1)[:, None] - 1
  ends = MASK & ((np.arange(7)[None] == 0) | (np.arange(7)[None] == last))
  np.testing.assert_allclose(
    some(1.0), features(drop(0.0), params, TEXTS, ends), atol=1e-6
  )
  np.testing.assert_array_equal(some(0.5), some(0.5))
  assert not np.array_equal(some(0.5)[0], some(0.5, 1)[0])
  with pytest.raises(ValueError, match="token_dropout .* needs mask_padding"):
    models.text("clip_vit_b32", token_dropout=0.5).init(jax.random.key(0), TEXTS, MASK)


def test_stochastic_depth():
  """A branch is skipped by whole examples; others count for more, so the mean stays."""
  network = models.image("vit_test", depth=2, drop_path=0.5, pool="tokens", cls=False)
  images = jnp.asarray(np.repeat(IMAGES[:1], 64, axis=0))
  params, whole = run(network, images)
  some = features(network, params, images, train=True)
  kinds = {x.round(3).tobytes() for x in some}
  assert len(kinds) == 4  # the last layer's two branches, each there or not
  assert not np.array_equal(whole, some)


def test_layer_scale_registers_and_masked_patches():
  options = {"layer_scale": 0.0, "registers": 3, "mask_token": True, "pool": "tokens"}
  network = models.image("vit_test", **options)
  mask = jnp.asarray(np.random.default_rng(0).uniform(size=(4, 4, 4)) < 0.4)
  params, _ = jax.jit(network.init)(jax.random.key(0), IMAGES, mask)
  assert params["registers"].shape == (3, 16) and params["mask"].shape == (16,)
  whole = features(network, params, IMAGES)
  masked = features(network, params, IMAGES, mask)
  assert whole.shape == (4, 1 + 3 + 16, 16)
  # Branches count for nothing yet, so that only masked patches differ,
  differs = np.abs(whole - masked).max(-1)[:, 4:] > 1e-3
  np.testing.assert_array_equal(differs, np.asarray(mask).reshape(4, 16))
  # and what is under the mask cannot be seen.
  hidden = np.repeat(np.repeat(np.asarray(mask), 8, 1), 8, 2)[..., None]
  other = np.where(hidden, np.float32(0.7), IMAGES)
  np.testing.assert_array_equal(masked, features(network, params, other, mask))


def test_initial_scales():
  """CLIP's text tower: the standard deviations of the paper's code."""
  network = models.text("clip_vit_b32", width=64, depth=2, heads=2, vocab=400)
  params, _ = jax.jit(network.init)(jax.random.key(0), TEXTS, MASK)
  block = params["encoder"]["block0"]
  scales = {
    "token": (params["token"], 0.02),
    "position": (params["position"], 0.01),
    "query": (block["attention"]["query"]["kernel"], 64**-0.5),
    "out": (block["attention"]["out"]["kernel"], (64 * 4) ** -0.5),
    "fc1": (block["mlp"]["fc1"]["kernel"], (2 * 64) ** -0.5),
    "fc2": (block["mlp"]["fc2"]["kernel"], (64 * 4) ** -0.5),
  }
  for name, (kernel, std) in scales.items():
    assert float(kernel.std()) == pytest.approx(std, rel=0.1), name


@pytest.mark.parametrize("name", ["vit_test", "scan", "patch_dropout", "text_test"])
def test_towers_on_a_mesh(name):
  """Equal to one device's; nothing travels but the sums of the gradients."""
  more = {
    "scan": {"scan": True, "remat": True},
    "patch_dropout": {"patch_dropout": 0.5, "drop_path": 0.2},
  }
  if name == "text_test":
    network = models.text(name)
    inputs = np.tile(TEXTS, (2, 1)), np.tile(MASK, (2, 1))
  else:
    network = models.image("vit_test", **more.get(name, {}))
    inputs = (np.tile(IMAGES, (2, 1, 1, 1)),)
  params, stats = jax.jit(network.init)(jax.random.key(0), *inputs)

  def loss(params, *inputs):
    rng = jax.random.key(1)
    y, _ = network.apply(params, stats, *inputs, train=True, rng=rng)
    return jnp.sin(y).sum()

  expected = jax.jit(jax.grad(loss))(params, *inputs)
  mesh = sharding.make_mesh(4, 2)
  whole = NamedSharding(mesh, PartitionSpec())
  args = jax.device_put(inputs, sharding.batch_sharding(mesh))
  step = jax.jit(jax.grad(loss), out_shardings=whole)
  compiled = step.lower(jax.device_put(params, whole), *args).compile()
  collectives = re.findall(
    r"(all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", compiled.as_text()
  )
  assert set(collectives) == {"all-reduce"}
  found = compiled(jax.device_put(params, whole), *args)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, expected
  )


def test_work_is_that_of_the_formulas():
  """Two operations a weight and token, four a pair of tokens and channel."""
  depth, width, tokens, n = 2, 64, 16, 4
  network = models.image("vit_test", depth=depth, width=width, cls=False, pool="mean")
  params, _ = jax.eval_shape(network.init, jax.random.key(0), IMAGES)
  apply = jax.jit(lambda p: network.apply(p, {}, IMAGES, train=False)[0])
  text = apply.lower(params).as_text()
  work = 0
  pattern = (
    r"contracting_dims = \[([\d, ]+)\] x .*?"
    r"\(tensor<([\dx]+)xf32>.*?-> tensor<([\dx]+)xf32>"
  )
  for axes, left, out in re.findall(pattern, text):
    left, out = ([int(d) for d in x.split("x")] for x in (left, out))
    work += 2 * math.prod(out) * math.prod(left[int(a)] for a in axes.split(", "))
  weights = 3 * 8 * 8 * width + depth * 12 * width**2
  assert work == n * tokens * (2 * weights + depth * 4 * tokens * width)


def test_errors_name_the_value():
  with pytest.raises(ValueError, match="'vit_b15'.*vit_b16"):
    models.image("vit_b15")
  with pytest.raises(ValueError, match="'bert'.*clip_vit_b32"):
    models.text("bert")
  with pytest.raises(TypeError, match="witdh"):
    models.text("text_test", witdh=2)
  for options, message in (
    ({"pool": "max"}, "'max'.*cls, mean, map, tokens"),
    ({"pool": "cls", "cls": False}, "class token"),
    ({"positions": "rope"}, "'rope'.*learned, sincos2d"),
    ({"activation": "relu6"}, "'relu6'.*gelu_tanh"),
    ({"kernel_init": "he"}, "'he'.*xavier"),
    ({"attention": "cudnn"}, "'cudnn'.*plain, flash"),
    ({"remat": "all"}, "'all'.*dots"),
    ({"heads": 3}, "width 16.*3 heads"),
    ({"patch": 64}, "32 x 32.*64 pixels"),
    ({"positions": "sincos2d", "width": 18}, "divisible by 4, not 18"),
  ):
    with pytest.raises(ValueError, match=message):
      sizes(models.image("vit_test", **options), images(32))
  with pytest.raises(ValueError, match="'first'.*highest"):
    sizes(models.text("text_test", pool="first"), *texts(4))
  network = models.text("text_test")
  params, _ = jax.eval_shape(network.init, jax.random.key(0), *texts(4))
  with pytest.raises(ValueError, match="5 tokens.*4 positions"):
    apply = lambda params, *x: network.apply(params, {}, *x, train=False)
    jax.eval_shape(apply, params, *texts(5))


def test_an_unknown_id_is_not_another_token():
  network = models.text("text_test", vocab=10)
  text = TEXTS % 10
  text[2, 4] = 10
  _, found = run(network, text, np.ones_like(MASK))
  np.testing.assert_array_equal(np.isnan(found).any(1), [False, False, True, False])
