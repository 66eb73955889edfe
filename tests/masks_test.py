"""Masks of patches: counts of the official generators, shapes, draws, devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from clj import augment
from clj.augment import masks
from clj.cli import UserError


def pictures(count, size=16):
  return jnp.zeros((count, size, size, 3), jnp.uint8)


def section(name, grid, views=2, **options):
  image = {"name": "views", "size": 2 * grid, "views": views}
  return {
    "image": image,
    "mask": {"name": name, "like": "image", "patch": 2, **options},
  }


def draw(name, grid, count, batches=1, seed=0, **options):
  """Masks `[batches * count, V, grid * grid]` of batches with keys of their own."""
  step = augment.make({**section(name, grid, **options)})
  batch = {"image": pictures(count)}
  one = lambda key: step(key, batch)["mask"]
  keys = jax.random.split(jax.random.key(seed), batches)
  found = np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))
  return found.reshape(batches * count, *found.shape[2:])


@pytest.fixture
def golden(golden_file):
  return np.load(golden_file("masks.npz"))


@pytest.mark.parametrize("setting", ["setting0", "setting1"])
def test_counts_of_a_batch_are_dinov2s(golden, setting):
  """So many masked views, one in each interval of ratios, and as rarely one short."""
  value = {
    k.removeprefix(setting + "_"): golden[k] for k in golden if k.startswith(setting)
  }
  grid, batch = int(value["grid"]), int(value["batch"])
  options = {
    "ratio": tuple(value["mask_ratio_min_max"].tolist()),
    "share": float(value["mask_sample_probability"]),
    "smallest": int(value["min_num_patches"]),
    "largest": int(value["max_num_patches"]),
    "aspect": tuple(np.exp(value["log_aspect_ratio"]).tolist()),
  }
  draws = {
    complete: draw("block_mask", grid, batch // 2, 60, complete=complete, **options)
    .sum(-1)
    .reshape(60, batch)
    for complete in (True, False)
  }
  masked = np.sort(draws[True])[:, -int(value["n_samples_masked"]) :]
  assert (np.sort(draws[True])[:, : -masked.shape[1]] == 0).all()
  assert (masked >= value["target_low"]).all() and (
    masked <= value["target_high"]
  ).all()
  assert masked.sum(1).max() <= value["upperbound"]
  theirs = value["n_masked_patches"]
  error = np.hypot(theirs.std() / 120**0.5, masked.sum(1).std() / 60**0.5)
  assert masked.sum(1).mean() == pytest.approx(theirs.mean(), abs=4 * error)
  assert masked.sum(1).std() == pytest.approx(theirs.std(), rel=0.4)
  short = (draws[True] - draws[False])[draws[True] > 0]
  assert short.min() == 0 and short.max() <= 4
  assert (short == 0).mean() == pytest.approx(value["fraction_of_exact"], abs=0.04)
  assert short.mean() == pytest.approx(value["mean_shortfall"], abs=0.04)


def test_counts_of_an_image_are_ibots(golden):
  """Half of the masks are empty, each by itself; blocks fall as short as theirs."""
  value = {k.removeprefix("ibot0_"): golden[k] for k in golden if "ibot0" in k}
  grid, (_, ratio), (_, var) = (
    value[k] for k in ("grid", "pred_ratio", "pred_ratio_var")
  )
  options = {
    "ratio": (ratio - var, ratio + var),
    "counts": "image",
    "smallest": int(grid // 3) ** 2,
  }
  grid = int(grid)
  wanted = draw("block_mask", grid, 400, **options).sum(-1).ravel()
  found = draw("block_mask", grid, 400, complete=False, **options).sum(-1).ravel()
  theirs = np.floor(value["target"])
  assert (wanted == 0).mean() == pytest.approx(value["fraction_unmasked"], abs=0.08)
  assert wanted[wanted > 0].mean() == pytest.approx(theirs[theirs > 0].mean(), rel=0.08)
  assert wanted[wanted > 0].min() >= int(0.1 * grid**2) and wanted.max() <= 98
  short, their_short = wanted - found, (theirs - value["count"])[theirs > 0]
  assert short.min() == 0
  assert short[wanted > 0].mean() == pytest.approx(their_short.mean(), abs=0.25)
  assert (short[wanted > 0] == 0).mean() == pytest.approx(
    (their_short == 0).mean(), abs=0.1
  )


def test_random_masks_have_exact_counts(golden):
  grid = int(golden["ibot1_grid"])
  mask = draw("random_mask", grid, 200, ratio=float(golden["ibot1_pred_ratio"][0]))
  assert mask.dtype == bool and mask.shape == (200, 2, grid**2)
  assert (mask.sum(-1) == golden["ibot1_count"][0]).all()
  share = mask.mean(axis=(0, 1))  # each patch as often as any other
  assert np.abs(share - 19 / 64).max() < 5 * (19 / 64 * 45 / 64 / 400) ** 0.5
  ranged = draw("random_mask", grid, 200, ratio=(0.0, 0.5), share=0.5).sum(-1)
  assert 0.3 < (ranged == 0).mean() < 0.7 and 24 < ranged.max() <= 32


def test_blocks_are_rectangles():
  """One block of just the wanted size where a block may be of no other."""
  options = {"ratio": (0.25, 0.25), "share": 1.0, "counts": "image", "smallest": 16}
  found = draw("block_mask", 8, 50, complete=False, aspect=(1, 1), **options)
  found = found.reshape(100, 8, 8)
  assert (found.sum((1, 2)) == 16).all()
  assert (found.any(1).sum(1) == 4).all() and (found.any(2).sum(1) == 4).all()
  corners = found.argmax(1).max(1) * 8 + found.argmax(2).max(1)
  assert len(np.unique(corners)) > 15
  tall = draw("block_mask", 8, 50, complete=False, aspect=(4, 4), **options)
  tall = tall.reshape(100, 8, 8)
  assert not tall.any()  # 8 rows of 2: a block must be smaller than the grid


def test_rows_and_views_have_their_own_masks():
  for name in ("random_mask", "block_mask"):
    options = {"counts": "image", "share": 1.0, "ratio": (0.4, 0.4)}
    mask = draw(name, 8, 16, **options)
    assert len(np.unique(mask.reshape(32, -1), axis=0)) == 32
    np.testing.assert_array_equal(draw(name, 8, 5, **options), mask[:5])
    assert not np.array_equal(draw(name, 8, 16, seed=1, **options), mask)


@pytest.mark.parametrize("name", ["random_mask", "block_mask"])
def test_same_masks_on_any_number_of_devices(name):
  """Bit for bit, beside views, with nothing sent, and not all made on each device."""
  spec = section(name, 8, counts="batch", share=0.5, ratio=(0.1, 0.5), indices=True)
  make = augment.make(spec)

  def step(key, batch):
    out = make(key, batch)
    x = out["image"].reshape(16, 2, 8, 2, 8, 2, 3).transpose(0, 1, 2, 4, 3, 5, 6)
    hidden = jnp.where(out["mask"][..., None], 0.0, x.reshape(16, 2, 64, 12))
    keys = ("mask", "mask_indices", "mask_weights")
    return {"hidden": hidden, **{k: out[k] for k in keys}}

  step, key = jax.jit(step), jax.random.key(0)
  images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
  whole = step(key, {"image": jnp.asarray(images)})
  assert (np.asarray(whole["mask"]).sum(-1) > 0).sum() == 16
  for devices in (1, 2, 4, 8):
    mesh = jax.make_mesh(
      (devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:devices]
    )
    placed = jax.device_put(images, NamedSharding(mesh, PartitionSpec("data")))
    split = step(key, {"image": placed})
    for k, value in whole.items():
      np.testing.assert_array_equal(split[k], value, err_msg=k)
  text = step.lower(key, {"image": placed}).compile().as_text()
  sends = r"all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
  assert not re.search(sends, text)
  assert split["mask"].sharding.shard_shape((16, 2, 64)) == (2, 2, 64)


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_shuffled_is_a_random_permutation(size):
  places = jnp.arange(size, dtype=jnp.int32)
  keys = jax.random.split(jax.random.key(size), 200)
  found = np.asarray(jax.jit(jax.vmap(lambda k: masks.shuffled(k, places, size)))(keys))
  assert (np.sort(found) == np.arange(size)).all()
  # The place of every position is uniform: its mean and spread over the keys.
  error = found.std(0) / 200**0.5
  assert (np.abs(found.mean(0) - (size - 1) / 2) <= 5 * error).all()
  expected = ((size**2 - 1) / 12) ** 0.5
  assert found.std(0).mean() == pytest.approx(expected, rel=0.05)


def test_hidden_patches_in_a_fixed_number_of_places():
  mask = jnp.asarray([[0, 1, 0, 1, 1], [0, 0, 0, 0, 0], [1, 0, 0, 0, 0]], bool)
  indices, weights = masks.hidden(mask, 3)
  np.testing.assert_array_equal(indices, [[1, 3, 4], [0, 1, 2], [0, 1, 2]])
  third = 1 / np.float32(3)
  np.testing.assert_array_equal(weights, [[third] * 3, [0, 0, 0], [1, 0, 0]])
  assert indices.dtype == jnp.int32 and weights.dtype == jnp.float32


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"patch": 3}, "mask.patch is 3, which does not divide the size 16 of 'image'"),
    ({"like": "img"}, "no entry 'img' of name 'views'"),
    ({"ratio": (0.5, 0.1)}, r"mask.ratio is \(0.5, 0.1\); give two numbers, rising"),
    ({"share": 0.0}, "mask.share is 0.0"),
    ({"counts": "all"}, "mask.counts is 'all'; use 'batch' or 'image'"),
    ({"smallest": 5, "largest": 4}, "mask has blocks of 5 to 4 patches"),
    ({"share": 0.2}, r"none of 2 x 2 views; use a larger share or batch"),
    ({"patches": 2}, "no key 'patches' in data.augment.mask; did you mean 'patch'"),
  ],
)
def test_errors_name_the_value(options, message):
  spec = section("block_mask", 8)
  spec["mask"].update(options)
  with pytest.raises(UserError, match=message):
    augment.make(spec)(jax.random.key(0), {"image": pictures(2)})
