"""Augmentations: the official operations, their order, keys, and crops."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from clj import augment
from clj.augment import crops, operations, policies
from clj.cli import UserError

BYOL = {
  "jitter": {"brightness": "additive", "amounts": (0.4, 0.4, 0.2, 0.1)},
  "blur": {"probability": (1.0, 0.1)},
  "solarize": {"probability": (0.0, 0.2)},
}


def pictures(count, size=16, views=1, seed=0):
  """uint8 `[count, views, size, size, 3]`: noise over patches of colour, some grey."""
  rng = np.random.default_rng(seed)
  patches = rng.integers(0, 200, (count, views, 2, 2, 3)).repeat(size // 2, 2)
  images = patches.repeat(size // 2, 3) + rng.integers(0, 56, (1, size, size, 3))
  images[0, ..., :2, :] = images[0, ..., :2, :1]
  return images.astype(np.uint8)


def planar(image):
  return jnp.moveaxis(jnp.asarray(image), -1, -3)


def channels_last(image):
  return np.moveaxis(np.asarray(image), -3, -1)


def entry(size=16, **options):
  return {"name": "views", "size": size, **options}


def run(images, seed=0, **options):
  """Views of pictures, whole or cut by the host, by default of the size they have."""
  options = entry(**{"size": images.shape[-2], **options})
  step = jax.jit(augment.make({"image": options}))
  return np.asarray(step(jax.random.key(seed), {"image": jnp.asarray(images)})["image"])


def official(golden):
  """What our functions give for each array of the golden file."""
  image = planar(golden["image"])
  value = {
    k: float(golden[k]) for k in golden if golden[k].shape == () and k[0] in "bchs"
  }
  sigma, taps = value["blur_sigma"], int(value["blur_kernel_size"])
  even = int(value["simclr_blur_even_kernel_size_input"])
  delta = jnp.zeros((3, 11, 11)).at[:, 5, 5].set(1.0)
  factors = [
    value[f"{name}_{kind}"]
    for name, kind in zip(
      operations.OPERATIONS, ("factor", "factor", "factor", "delta")
    )
  ]
  shared = {
    "contrast": operations.contrast(image, factors[1]),
    "saturation": operations.saturation(image, factors[2]),
    "hue": operations.hue(image, factors[3]),
    "grayscale": operations.grayscale(image),
    "blur": operations.gaussian_blur(image, sigma, taps),
  }
  return {
    **{f"simclr_{k}": v for k, v in shared.items()},
    **{f"byol_{k}": v for k, v in shared.items()},
    "simclr_brightness": operations.brightness(image, factors[0]),
    "simclr_color_jitter_fixed_order": operations.color_jitter(image, factors),
    "simclr_blur_even": operations.gaussian_blur(image, sigma, even),
    "simclr_blur_of_delta": operations.gaussian_blur(delta, sigma, taps),
    "byol_brightness": operations.brightness_additive(
      image, value["byol_brightness_delta"]
    ),
    "byol_hsv": operations.rgb_to_hsv(image),
    "byol_solarize_0p5": operations.solarize(image),
  }


def test_operations_are_the_official_ones(golden_file):
  golden = np.load(golden_file("augment_ops.npz"))
  found = official(golden)
  assert set(found) == {k for k in golden if k.startswith(("simclr_", "byol_"))} - {
    "simclr_blur_even_kernel_size_input",
    "byol_brightness_delta",
  }
  for name, ours in found.items():
    np.testing.assert_allclose(
      channels_last(ours), golden[name], atol=2e-6, err_msg=name
    )


@pytest.mark.parametrize("additive", [False, True])
def test_jitter_is_its_operations_one_by_one_in_every_order(additive):
  """All 24 orders at once, one an image, beside a plain loop that clips after each."""
  orders = list(itertools.permutations(operations.OPERATIONS))
  image = planar(pictures(24)[:, 0] / np.float32(255))
  factors = [jnp.linspace(*ends, 24) for ends in ((0.2, 1.8), (1.8, 0.2), (0, 2.5))]
  factors.append(jnp.linspace(-0.2, 0.2, 24))
  first = operations.brightness_additive if additive else operations.brightness
  functions = (first, operations.contrast, operations.saturation, operations.hue)
  slots = jnp.asarray(operations.SLOTS)
  together = jax.jit(functools.partial(operations.jitter_slots, additive=additive))
  together = together(image, factors, slots)
  for i, order in enumerate(orders):
    expected = image[i]
    for name in order:
      k = operations.OPERATIONS.index(name)
      expected = jnp.clip(functions[k](expected, factors[k][i]), 0, 1)
    # Where two channels are equal up to rounding, rounding decides the hue.
    np.testing.assert_allclose(together[i], expected, atol=2e-5, err_msg=str(order))


def test_jitter_that_does_not_happen_changes_no_bit():
  image = planar(pictures(4)[:, 0] / np.float32(255))
  factors = [jnp.full(4, 1.7)] * 3 + [jnp.full(4, 0.1)]
  idle = operations.jitter_slots(image, factors, jnp.zeros((4, 6, 4), bool), False)
  np.testing.assert_array_equal(idle, image)


def split_over_devices(batch):
  mesh = jax.make_mesh((8, 1), ("data", "fsdp"), (AxisType.Auto, AxisType.Auto))
  return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(("data", "fsdp"))))


SENDS = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
CROPS = entry(8, of="image", views=3, crop_scale=(0.05, 0.4), jitter={})
GRAM = entry(24, of="image", views=2, boxes_of="image")


@pytest.mark.parametrize("cut", ["here", "by the host"])
def test_same_views_on_any_number_of_devices(cut):
  """With nothing sent; and no row depends on the other rows.

  Bit for bit, but where a side over another is no exact number: the last bit of the
  weights of such crops is the compiler's.
  """
  section = {"image": entry(**BYOL), "crops": CROPS, "gram": GRAM}
  batch = {"image": pictures(16)[:, 0]}
  if cut == "by the host":
    sizes = {"image": (16, 2), "crops": (8, 3), "gram": (24, 2)}
    batch = {k: pictures(16, size, views) for k, (size, views) in sizes.items()}
  step = jax.jit(augment.make(section))
  key = jax.random.key(3)
  whole = step(key, jax.tree.map(jnp.asarray, batch))
  placed = split_over_devices(batch)
  split = step(key, placed)
  assert not re.search(SENDS, step.lower(key, placed).compile().as_text())
  part = step(key, {k: jnp.asarray(v[:5]) for k, v in batch.items()})
  for name in section:
    assert len(split[name].sharding.device_set) == 8
    atol = 0 if name == "image" or cut != "here" else 2e-6
    same = functools.partial(np.testing.assert_allclose, rtol=0, atol=atol)
    same(split[name], whole[name], err_msg=name)
    same(part[name], whole[name][:5], err_msg=name)


# Two views of each of 4 pictures, cut here to 12 pixels or by the host to 16: for each
# view the sum of its numbers times cos(0), cos(1), ...
STORED = {
  ("byol", "here"): [
    (0.07617, -0.0179, -0.01125, -0.1444),
    (0.01179, 0.3596, -0.09068, -0.21847),
  ],
  ("byol", "by the host"): [
    (0.22984, 1.63187, 0.01656, 2.52848),
    (0.07595, 0.39986, 0.20254, 0.11267),
  ],
  ("simclr", "here"): [
    (-0.25311, 0.39576, -0.33608, -1.22998),
    (0.06996, 0.00814, -1.74794, -0.08667),
  ],
  ("simclr", "by the host"): [
    (0.16558, 1.03115, -0.51349, -1.34645),
    (0.23094, -0.62876, -1.542, -0.21143),
  ],
}
OPTIONS = {
  "byol": {
    "jitter": {"brightness": "additive", "amounts": (0.4, 0.4, 0.2, 0.1)},
    "blur": {"probability": (1.0, 0.1), "kernel_size": 3},
    "solarize": {"probability": (0.0, 0.5)},
  },
  "simclr": {"jitter": {"strength": 0.5}, "crop_scale": (0.2, 1.0)},
}


@pytest.mark.parametrize(("options", "cut"), STORED)
def test_views_of_a_seed_stay_what_they_were(options, cut):
  """So that a run that is started again, by a later version, gives the same curves."""
  if cut == "here":
    found = run(pictures(4)[:, 0], seed=7, size=12, **OPTIONS[options])
  else:
    found = run(pictures(4, views=2), seed=7, **OPTIONS[options])
  found = found.reshape(8, -1).astype(np.float64)
  sums = found @ np.cos(np.arange(found.shape[1]))
  np.testing.assert_allclose(sums, np.ravel(STORED[options, cut]), atol=1e-4)


OFF = {"flip": 0.0, "grayscale": 0.0}


def test_rows_and_views_have_their_own_keys_and_options_do_not_disturb_each_other():
  images = np.repeat(pictures(1)[:, 0], 4, axis=0)
  views = run(images).reshape(8, -1)
  assert len(np.unique(views, axis=0)) == 8
  assert not np.array_equal(views, run(images, seed=1).reshape(8, -1))
  plain = run(images, **OFF)
  flipped = run(images, flip=1.0, grayscale=0.0)
  np.testing.assert_array_equal(flipped, plain[..., ::-1, :])


def test_entries_have_draws_of_their_own_in_any_order():
  """The same for all orders of the entries, and with some of them left out."""
  images = {"image": jnp.asarray(np.repeat(pictures(1)[:, 0], 4, axis=0))}
  section = {k: entry(of="image", **OFF) for k in ("image", "other", "third")}
  key = jax.random.key(0)
  found = jax.jit(augment.make(section))(key, images)
  again = jax.jit(augment.make(dict(reversed(section.items()))))(key, images)
  alone = jax.jit(augment.make({"third": section["third"]}))(key, images)
  for name in section:
    np.testing.assert_array_equal(found[name], again[name])
  np.testing.assert_array_equal(found["third"], alone["third"])
  np.testing.assert_array_equal(alone["image"], images["image"])  # passed through
  every = np.concatenate([np.asarray(found[name]).reshape(8, -1) for name in section])
  assert len(np.unique(every, axis=0)) == 24


def test_shared_boxes():
  """At twice the size: the same boxes and flips, without a change of colour."""
  images = {"image": jnp.asarray(pictures(8)[:, 0])}
  cut = {"grayscale": 0.0, "crop_scale": (0.2, 0.6)}
  section = {
    "image": entry(32, **cut),
    "gram": entry(64, of="image", boxes_of="image"),
    "mirrored": entry(64, of="image", boxes_of="image", flip=1.0),
    "own": entry(64, of="image", **cut),
  }
  found = jax.jit(augment.make(section))(jax.random.key(0), images)
  view = np.asarray(found["image"])

  def errors(images):
    small = np.asarray(images).reshape(8, 2, 32, 2, 32, 2, 3).mean((3, 5))
    return np.abs(small - view).mean(axis=(2, 3, 4))

  assert errors(found["gram"]).max() < 0.02
  assert np.median(errors(found["own"])) > 0.05
  mirrored = errors(found["mirrored"]), errors(found["mirrored"][..., ::-1, :])
  assert np.minimum(*mirrored).max() < 0.02
  assert 4 <= (mirrored[0] < 0.02).sum() <= 12  # those that "image" has mirrored
  section["image"] = {**section["image"], "grayscale": 1.0}
  gray = jax.jit(augment.make(section))(jax.random.key(0), images)
  np.testing.assert_array_equal(gray["gram"], found["gram"])


@pytest.mark.parametrize("views", [1, 2])
def test_whole_pictures_are_always_cropped(views):
  """Also to a single view, also where the size is that of the picture already."""
  images = pictures(8)[:, 0]
  same = np.broadcast_to(images[:, None] / np.float32(255), (8, views, 16, 16, 3))
  whole = run(images, views=views, crop_scale=(1, 1), **OFF)
  np.testing.assert_allclose(whole, same, atol=1e-6)
  cut = run(images, views=views, crop_scale=(0.2, 0.5), **OFF)
  assert (np.abs(cut - same).mean(axis=(2, 3, 4)) > 0.02).all()


def test_order_of_the_colours():
  """MoCo v1 drops the colour first: a jitter of the hue then changes nothing."""
  jitter = {"strength": 1.0, "probability": 1.0, "amounts": (0.0, 0.0, 0.0, 0.5)}
  options = {"flip": 0.0, "grayscale": 1.0, "crop_scale": (1, 1)}
  images = pictures(4)[:, 0]
  plain = run(images, **options)
  first = ("grayscale", "jitter", "blur", "solarize")
  found = run(images, order=first, jitter=jitter, **options)
  np.testing.assert_allclose(found, plain, atol=1e-6)
  last = ("solarize", "jitter", "grayscale", "blur")
  assert np.abs(run(images, order=last, jitter=jitter, **options) - plain).max() > 0.05
  found = run(images, order=last, solarize={"probability": 1.0}, **options)
  inverted = np.where(images < 127.5, images, 255 - images) / np.float32(255)
  gray = inverted @ np.float32([0.2989, 0.587, 0.114])
  np.testing.assert_allclose(found[:, 0, ..., 0], gray, atol=1e-6)


def test_crop_is_pillows_bicubic():
  image = pictures(1, size=24)[:, 0]
  boxes = [(3.0, 2.0, 20.0, 9.0), (0.0, 5.0, 7.0, 18.0)]
  arrays = [jnp.asarray([values]) for values in zip(*boxes, strict=True)]
  found = crops.crop_resize(
    jnp.asarray(image / np.float32(255)), arrays, jnp.zeros((1, 2), bool), 12
  )
  for (top, left, height, width), ours in zip(boxes, found[0], strict=True):
    box = (left, top, left + width, top + height)
    crop = Image.fromarray(image[0]).crop([int(x) for x in box])
    theirs = np.asarray(crop.resize((12, 12), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(channels_last(ours), theirs, atol=2.5 / 255)


def test_boxes_lie_in_the_picture_and_in_the_ranges():
  uniforms = np.random.default_rng(0).random((4000, 2 * crops.ATTEMPTS + 2))
  boxes = crops.crop_boxes(
    jnp.asarray(uniforms, jnp.float32), 96, 128, (0.2, 0.6), (3 / 4, 4 / 3)
  )
  top, left, height, width = (np.asarray(x) for x in boxes)
  assert (top >= 0).all() and (top + height <= 96).all()
  assert (left >= 0).all() and (left + width <= 128).all()
  area = height * width / (96 * 128)
  assert 0.19 < area.min() < 0.22 and 0.58 < area.max() < 0.61
  assert area.mean() == pytest.approx(0.4, abs=0.02)
  ratio = width / height
  assert 0.72 < ratio.min() < 0.77 and 1.3 < ratio.max() < 1.38
  assert top.min() == left.min() == 0


def test_one_probability_a_view():
  images = pictures(64, views=2)
  off = run(images, **OFF)
  plain = augment.to_float({"image": images, "label": np.arange(64)})
  np.testing.assert_allclose(off, plain["image"], atol=1e-6)
  assert plain["label"].dtype == np.int64
  options = {
    "solarize": {"probability": (0.0, 1.0)},
    "blur": {"probability": (1.0, 0.0)},
  }
  found = run(images, **OFF, **options, size=16)
  expected = np.where(off[:, 1] < 0.5, off[:, 1], 1 - off[:, 1])
  np.testing.assert_allclose(found[:, 1], expected, atol=1e-6)
  gray = run(images, flip=0.0, grayscale=(0.0, 0.4))
  colorless = (gray.max(-1) == gray.min(-1)).all(axis=(2, 3))
  assert not colorless[:, 0].any()
  assert 0.2 < colorless[:, 1].mean() < 0.6


def test_what_has_no_entry_passes_through():
  batch = {"image": jnp.asarray(pictures(4)[:, 0]), "label": jnp.arange(4)}
  step = jax.jit(augment.make({"image": entry(), "crops": CROPS}))
  out = step(jax.random.key(0), batch)
  np.testing.assert_array_equal(out["label"], batch["label"])
  assert set(out) == {"image", "crops", "label"}
  assert out["image"].shape == (4, 2, 16, 16, 3)
  assert out["crops"].shape == (4, 3, 8, 8, 3)
  assert out["image"].dtype == out["crops"].dtype == jnp.float32


def test_crops_of_the_host_are_not_cut_again():
  given = {"image": pictures(4, views=2), "crops": pictures(4, size=8, views=3)}
  section = {"image": entry(**OFF), "crops": entry(8, of="image", views=3, **OFF)}
  out = augment.make(section)(jax.random.key(0), jax.tree.map(jnp.asarray, given))
  for name, images in given.items():
    np.testing.assert_allclose(out[name], images / np.float32(255), atol=1e-6)
  with pytest.raises(UserError, match="the host has cut 'image' already and has not"):
    augment.make(section)(jax.random.key(0), {"image": given["image"]})


def test_what_the_host_cuts():
  section = {
    "gram": entry(32, of="image", views=1, boxes_of="image"),
    "crops": entry(8, of="image", views=6, crop_scale=[0.05, 0.2], crop_ratio=[1, 2]),
    "depth": entry(8, views=1),
    "mask": {"name": "random_mask", "like": "image", "patch": 4},
    "image": entry(16, crop_scale=(0.3, 1)),
  }
  usual = (3 / 4, 4 / 3)
  found = augment.host_crops(section, "image")
  assert found == (
    ("image", 16, 2, (0.3, 1.0), usual, ""),
    ("crops", 8, 6, (0.05, 0.2), (1.0, 2.0), ""),
    ("gram", 32, 1, (0.3, 1.0), usual, "image"),
  )
  assert found[0]._fields == ("key", "size", "views", "scale", "ratio", "boxes_of")
  alone = augment.host_crops(section, "depth")
  assert alone == (("depth", 8, 1, (0.08, 1.0), usual, ""),)
  assert augment.host_crops(section, "text") == augment.host_crops({}, "image") == ()


GRAM_OF = {"of": "image", "boxes_of": "image"}


@pytest.mark.parametrize(
  ("section", "message"),
  [
    ({"image": entry(jitter={"strenght": 1})}, "jitter has no option 'strenght'"),
    ({"image": entry(jitter={"brightness": "both"})}, "'multiplicative' or 'additive'"),
    ({"image": entry(jitter={"amounts": (0.8,) * 3})}, "amounts is .*; give four num"),
    ({"image": entry(blur={"sigma": (0, 2)})}, r"blur.sigma is \(0, 2\); give two"),
    ({"image": entry(flip=1.5)}, "image.flip has the probability 1.5"),
    ({"image": entry(grayscale=(0.1, 0.2, 0.3))}, "each of the 2 views"),
    ({"image": entry(order=("jitter",))}, "give each of jitter, grayscale, blur, sol"),
    ({"image": entry(fliip=0.5)}, "'fliip' in data.augment.image; did you mean 'flip'"),
    ({"image": {"name": "view", "size": 8}}, "image has the name 'view'; there are: v"),
    ({"image": {"size": 8}}, "image has the name None; there are: views"),
    ({"flip": 0.5}, "data.augment.flip is 0.5: each key that comes out has an entry"),
    ({"image": {"name": "views"}}, "data.augment.image needs a 'size'"),
    ({"image": entry(0)}, "image.size is 0; give a whole number"),
    ({"image": entry(views=1.5)}, "image.views is 1.5; give a whole number"),
    ({"image": entry(crop_scale=(0.5, 1.2))}, r"crop_scale is \(0.5, 1.2\); give two"),
    ({"image": entry(crop_ratio=(2, 1))}, r"crop_ratio is \(2, 1\); give two"),
    ({"gram": entry(**GRAM_OF)}, "no entry 'image' of name 'views'"),
    ({"image": entry(), "gram": entry(views=3, **GRAM_OF)}, "has boxes for 2"),
    (
      {"image": entry(), "gram": entry(crop_scale=(1, 1), **GRAM_OF)},
      "drop its crop_s",
    ),
    ({"image": entry(boxes_of="image")}, "which has no boxes of its own"),
    ({"image": entry(), "gram": entry(boxes_of="image")}, "entry of another picture"),
    (
      {"image": entry(views=3)},
      "has views=3 of size=16, but the host has cut 2 of 16x",
    ),
    ({"image": entry(12)}, "has views=2 of size=12, but the host has cut 2 of 16x16 p"),
    ({"depth": entry()}, "made of 'depth', which the batch has not; it has: image"),
    ({"index": entry()}, r"'index', which is no picture but int32 \[2\]"),
    ({"whole": entry(of="image")}, "of 'image', but 'whole' is a column too"),
  ],
)
def test_errors_name_the_value(section, message):
  batch = {"image": pictures(2, views=2), "whole": pictures(2)[:, 0]}
  batch["index"] = np.arange(2, dtype=np.int32)
  with pytest.raises(UserError, match=message):
    augment.make(section)(jax.random.key(0), batch)


@pytest.mark.parametrize(
  ("section", "gray", "inverted"),
  [
    ({"image": policies.simclr(16)}, (0.2, 0.2), (0.0, 0.0)),
    ({"image": policies.moco_v1(16)}, (0.2, 0.2), (0.0, 0.0)),
    ({"image": policies.moco_v2(16)}, (0.2, 0.2), (0.0, 0.0)),
    ({"image": policies.byol(16)}, (0.2, 0.2), (0.0, 0.2)),
    (policies.swav(16, 8, views=3), (0.2, 0.2), (0.0, 0.0)),
    (policies.dino(16, 8, views=3), (0.2, 0.2), (0.0, 0.2)),
  ],
)
def test_policies(section, gray, inverted):
  """How many of the views of a light blue picture have lost their colour, or light."""
  picture = np.full((400, 16, 16, 3), (220, 220, 250), np.uint8)
  for entry in section.values():  # which would do the same
    entry["jitter"] = {**entry["jitter"], "strength": 0.0}
    entry["blur"] = None
  out = jax.jit(augment.make(section))(jax.random.key(0), {"image": picture})
  views = np.asarray(out["image"]).mean(axis=(2, 3))
  found = (views.max(-1) - views.min(-1) < 0.01).mean(0)
  np.testing.assert_allclose(found, gray, atol=0.06)
  np.testing.assert_allclose((views.max(-1) < 0.5).mean(0), inverted, atol=0.06)
  assert out["image"].shape == (400, 2, 16, 16, 3)
  if len(section) == 2:
    assert out["crops"].shape == (400, 3, 8, 8, 3)
    ranges = [one.scale for one in augment.host_crops(section, "image")]
    assert ranges[0][0] == ranges[1][1]
