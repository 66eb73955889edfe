"""Augmentations: the official operations, their order, keys, and crops."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from PIL import Image

from clj import augment

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


def run(images, seed=0, **options):
  options = {"size": images.shape[2], **options}
  step = jax.jit(augment.make(**options))
  return step(jax.random.key(seed), {"image": jnp.asarray(images)})


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
    for name, kind in zip(augment.OPERATIONS, ("factor", "factor", "factor", "delta"))
  ]
  shared = {
    "contrast": augment.contrast(image, factors[1]),
    "saturation": augment.saturation(image, factors[2]),
    "hue": augment.hue(image, factors[3]),
    "grayscale": augment.grayscale(image),
    "blur": augment.gaussian_blur(image, sigma, taps),
  }
  return {
    **{f"simclr_{k}": v for k, v in shared.items()},
    **{f"byol_{k}": v for k, v in shared.items()},
    "simclr_brightness": augment.brightness(image, factors[0]),
    "simclr_color_jitter_fixed_order": augment.color_jitter(image, factors),
    "simclr_blur_even": augment.gaussian_blur(image, sigma, even),
    "simclr_blur_of_delta": augment.gaussian_blur(delta, sigma, taps),
    "byol_brightness": augment.brightness_additive(
      image, value["byol_brightness_delta"]
    ),
    "byol_hsv": augment.rgb_to_hsv(image),
    "byol_solarize_0p5": augment.solarize(image),
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
  orders = list(itertools.permutations(augment.OPERATIONS))
  image = planar(pictures(24)[:, 0] / np.float32(255))
  factors = [jnp.linspace(*ends, 24) for ends in ((0.2, 1.8), (1.8, 0.2), (0, 2.5))]
  factors.append(jnp.linspace(-0.2, 0.2, 24))
  first = augment.brightness_additive if additive else augment.brightness
  functions = (first, augment.contrast, augment.saturation, augment.hue)
  slots = jnp.asarray(augment.SLOTS)
  together = jax.jit(functools.partial(augment._jitter, additive=additive))
  together = together(image, factors, slots)
  for i, order in enumerate(orders):
    expected = image[i]
    for name in order:
      k = augment.OPERATIONS.index(name)
      expected = jnp.clip(functions[k](expected, factors[k][i]), 0, 1)
    # Where two channels are equal up to rounding, rounding decides the hue.
    np.testing.assert_allclose(together[i], expected, atol=2e-5, err_msg=str(order))


def test_jitter_that_does_not_happen_changes_no_bit():
  image = planar(pictures(4)[:, 0] / np.float32(255))
  factors = [jnp.full(4, 1.7)] * 3 + [jnp.full(4, 0.1)]
  idle = augment._jitter(image, factors, jnp.zeros((4, 6, 4), bool), False)
  np.testing.assert_array_equal(idle, image)


def test_same_views_on_any_number_of_devices():
  """Bit for bit, cropped here or by the host; and no row depends on the other rows."""
  for views in (1, 2):
    images = pictures(16, views=views)
    step = jax.jit(augment.make(size=16, **BYOL))
    key = jax.random.key(3)
    whole = step(key, {"image": jnp.asarray(images)})["image"]
    mesh = jax.make_mesh((8, 1), ("data", "fsdp"), (AxisType.Auto, AxisType.Auto))
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    split = step(key, {"image": jax.device_put(images, sharding)})["image"]
    assert len(split.sharding.device_set) == 8
    np.testing.assert_array_equal(split, whole)
    part = step(key, {"image": jnp.asarray(images[:5])})["image"]
    np.testing.assert_array_equal(part, whole[:5])


OFF = {"flip": 0.0, "grayscale": 0.0}


def test_rows_and_views_have_their_own_keys_and_options_do_not_disturb_each_other():
  images = np.repeat(pictures(1), 4, axis=0)
  views = np.asarray(run(images)["image"]).reshape(8, -1)
  assert len(np.unique(views, axis=0)) == 8
  assert not np.array_equal(
    views, np.asarray(run(images, seed=1)["image"]).reshape(8, -1)
  )
  plain = np.asarray(run(images, **OFF)["image"])
  flipped = np.asarray(run(images, flip=1.0, grayscale=0.0)["image"])
  np.testing.assert_array_equal(flipped, plain[..., ::-1, :])


def test_crop_is_pillows_bicubic():
  image = pictures(1, size=24)[:, 0]
  boxes = [(3.0, 2.0, 20.0, 9.0), (0.0, 5.0, 7.0, 18.0)]
  arrays = [jnp.asarray([values]) for values in zip(*boxes, strict=True)]
  found = augment.crop_resize(
    jnp.asarray(image / np.float32(255)), arrays, jnp.zeros((1, 2), bool), 12
  )
  for (top, left, height, width), ours in zip(boxes, found[0], strict=True):
    box = (left, top, left + width, top + height)
    crop = Image.fromarray(image[0]).crop([int(x) for x in box])
    theirs = np.asarray(crop.resize((12, 12), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(channels_last(ours), theirs, atol=2.5 / 255)


def test_boxes_lie_in_the_picture_and_in_the_ranges():
  uniforms = np.random.default_rng(0).random((4000, 2 * augment.ATTEMPTS + 2))
  boxes = augment.crop_boxes(
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
  off = np.asarray(run(images, **OFF)["image"])
  np.testing.assert_allclose(
    off, augment.to_float({"image": images})["image"], atol=1e-6
  )
  options = {
    "solarize": {"probability": (0.0, 1.0)},
    "blur": {"probability": (1.0, 0.0)},
  }
  found = np.asarray(run(images, **OFF, **options, size=16)["image"])
  expected = np.where(off[:, 1] < 0.5, off[:, 1], 1 - off[:, 1])
  np.testing.assert_allclose(found[:, 1], expected, atol=1e-6)
  gray = np.asarray(run(images, flip=0.0, grayscale=(0.0, 0.4))["image"])
  colorless = (gray.max(-1) == gray.min(-1)).all(axis=(2, 3))
  assert not colorless[:, 0].any()
  assert 0.2 < colorless[:, 1].mean() < 0.6


def test_nothing_but_the_pictures_is_touched():
  images = pictures(4)
  label = jnp.arange(4)
  crops = {"size": 8, "views": 3, "crop_scale": (0.05, 0.4)}
  batch = {"image": jnp.asarray(images), "label": label}
  step = jax.jit(augment.make(size=16, crops=crops))
  out = step(jax.random.key(0), batch)
  np.testing.assert_array_equal(out["label"], label)
  assert set(out) == {"image", "crops", "label"}
  assert out["image"].shape == (4, 2, 16, 16, 3)
  assert out["crops"].shape == (4, 3, 8, 8, 3)
  assert out["image"].dtype == out["crops"].dtype == jnp.float32
  given = {**batch, "crops": jnp.asarray(pictures(4, size=8, views=3))}
  assert step(jax.random.key(0), given)["crops"].shape == (4, 3, 8, 8, 3)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"jitter": {"strenght": 1}}, "jitter has no option 'strenght'"),
    ({"jitter": {"brightness": "both"}}, "'multiplicative' or 'additive'"),
    ({"flip": 1.5}, r"flip probability 1.5"),
    ({"grayscale": (0.1, 0.2, 0.3)}, "one for each of the 2 views"),
    ({"views": 3}, "views=3"),
    ({"size": 12}, "size=12"),
  ],
)
def test_errors_name_the_value(options, message):
  with pytest.raises(ValueError, match=message):
    run(pictures(2, views=2), **options)
