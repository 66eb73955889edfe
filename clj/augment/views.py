"""Views of pictures: random resized crops, flips and colours, by row and view.

Inside, images are planar, `[..., 3, H, W]`: a last axis of three fills 3 of the 128
lanes of a TPU and does not vectorise on a CPU. Batches outside are `[B, V, H, W, 3]`.

One key per (seed, step, entry, row, view), with the row in the global batch. The
numbers of a view are drawn from its key at fixed places: to switch one augmentation off
leaves the others as they were.
"""

import zlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from clj.augment import operations
from clj.augment.crops import ATTEMPTS, crop_boxes, crop_resize
from clj.cli import UserError
from clj.data.images import CropSet

Array = jax.Array

CROP_SCALE = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
FLIPPED = 0.5
GRAYSCALE = 0.2
JITTER = {
  "strength": 1.0,
  "probability": 0.8,
  "brightness": "multiplicative",
  "amounts": (0.8, 0.8, 0.8, 0.2),
}
BLUR = {"probability": 0.5, "sigma": (0.1, 2.0), "kernel_size": None}
SOLARIZE = {"probability": 0.0, "threshold": 0.5}

# Places in the vector of uniform numbers of a view.
CROP = slice(0, 2 * ATTEMPTS + 2)
FLIP, JITTERED, ORDER, GRAYED, BLURRED, SIGMA, SOLARIZED = range(22, 29)
FACTORS = slice(29, 33)
UNIFORMS = 33


def views(
  key: str,
  section: dict,
  /,
  *,
  size: int,
  views: int = 2,
  of: str | None = None,
  boxes_of: str = "",
  crop_scale: tuple[float, float] = CROP_SCALE,
  crop_ratio: tuple[float, float] = CROP_RATIO,
  flip=None,
  jitter: dict | None = None,
  grayscale=None,
  blur: dict | None = None,
  solarize: dict | None = None,
  order: tuple[str, ...] = ("jitter", "grayscale", "blur", "solarize"),
) -> Callable:
  """The entry "views": `(rng, batch) -> {key: float32 [B, views, size, size, 3]}`.

  A whole picture, uint8 `[B, H, W, 3]`, is cut here: each view is a random resized crop
  of it, also a single one, and whatever the picture's size. Of pictures that the host
  has cut, uint8 `[B, views, size, size, 3]` in `batch[key]`, only the rest is made.
  Cropping and flip come first (a mirrored picture has the same colours, so the place of
  the flip does not matter), then the colours in their `order`.

  Every probability is a number, or one number a view (BYOL's pair: blur (1.0, 0.1),
  solarize (0.0, 0.2)). What has probability 0 in all views costs nothing.

  Args:
    size: side of the views, pixels.
    views: number of views.
    of: the picture column that they are views of; `key` by default.
    boxes_of: key of another entry of that picture, whose boxes and flips these views
      share, one by one: DINOv3's crops for the Gram teacher (arXiv 2508.10104).
    crop_scale: range of the crop's area, as a share of the picture's; (1, 1): whole.
    crop_ratio: range of the crop's width over height.
    flip: probability of mirroring left to right; 0.5 by default. A number beside
      `boxes_of` is a flip of these views' own.
    jitter: dict of `strength`, `probability`, `brightness` ("multiplicative" as in
      SimCLR, "additive" as in BYOL) and `amounts`: how far brightness, contrast,
      saturation and hue may go at strength 1. None: no jitter. Defaults: `JITTER`.
    grayscale: probability of dropping the colour; 0.2 by default, 0 with `boxes_of`.
    blur: dict of `probability`, `sigma` (range, pixels) and `kernel_size` (pixels; a
      tenth of `size` where None). None: no blur. Defaults: `BLUR`.
    solarize: dict of `probability` and `threshold`. None: none. Defaults: `SOLARIZE`.
    order: of the colours; MoCo v1 has "grayscale" before "jitter".
  """
  crops = crop_set(key, section)
  boxes = crop_set(boxes_of, section) if boxes_of else crops
  flips = boxes if flip is None else crops  # whose they are
  flip = section[flips.key].get("flip", FLIPPED) if flip is None else flip
  mirror = _probability(f"data.augment.{flips.key}.flip", flip, flips.views)[:, :views]
  if grayscale is None:
    grayscale = 0.0 if boxes_of else GRAYSCALE
  given = {"jitter": jitter, "grayscale": grayscale, "blur": blur, "solarize": solarize}
  colours = _colours(given, order, crops)

  def augment(rng, batch):
    images = pictures(batch, key, section)
    draws = {
      name: _draw(entry_rng(rng, name), images.shape[0], views)
      for name in dict.fromkeys((key, boxes.key))
    }
    mirrored = draws[flips.key][..., FLIP] < mirror
    if images.ndim == 4:
      height, width = images.shape[1:3]
      places = draws[boxes.key][..., CROP]
      places = crop_boxes(places, height, width, crops.scale, crops.ratio)
      x = crop_resize(float_image(images), places, mirrored, size)
    else:
      x = float_image(jnp.moveaxis(images, -1, -3))
      if mirror.any():
        x = jnp.where(operations.per_image(mirrored), x[..., ::-1], x)
    for colour in colours:
      x = colour(x, draws[key])
    return {key: jnp.moveaxis(x, -3, -1)}

  return augment


def source(key: str, section: dict) -> str:
  """The picture column that a `views` entry is of."""
  return section[key].get("of") or key


def crop_set(key: str, section: dict) -> CropSet:
  """The crops of the `views` entry `key`, checked.

  Raises UserError where there is no such entry, or its options do not fit.
  """
  entry = section.get(key, {})
  where = f"data.augment.{key}"
  if entry.get("name") != "views" or "size" not in entry:
    raise UserError(f"data.augment has no entry {key!r} of name 'views' with a size")
  size, count = entry["size"], entry.get("views", 2)
  for name, value in (("size", size), ("views", count)):
    if not isinstance(value, int) or value < 1:
      raise UserError(f"{where}.{name} is {value!r}; give a whole number from 1")
  scale = rising(f"{where}.crop_scale", entry.get("crop_scale", CROP_SCALE), 1)
  ratio = rising(f"{where}.crop_ratio", entry.get("crop_ratio", CROP_RATIO))
  if boxes_of := entry.get("boxes_of", ""):
    if section.get(boxes_of, {}).get("boxes_of") or boxes_of == key:
      raise UserError(
        f"{where}.boxes_of is {boxes_of!r}, which has no boxes of its own"
      )
    boxes = crop_set(boxes_of, section)
    if source(boxes_of, section) != source(key, section):
      raise UserError(f"{where}.boxes_of is {boxes_of!r}, an entry of another picture")
    if "crop_scale" in entry or "crop_ratio" in entry:
      raise UserError(
        f"{where} takes the boxes of {boxes_of!r}: drop its crop_scale/ratio"
      )
    if count > boxes.views:
      raise UserError(
        f"{where}.views is {count}, but {boxes_of!r} has boxes for {boxes.views}"
      )
    scale, ratio = boxes.scale, boxes.ratio
  return CropSet(key, size, count, scale, ratio, boxes_of)


def pictures(batch: dict, key: str, section: dict) -> Array:
  """The raw pictures of a `views` entry: whole `[B, H, W, 3]`, or cut by the host."""
  crops, of = crop_set(key, section), source(key, section)
  where = f"data.augment.{key}"
  found = key if key in batch else of
  if found not in batch:
    raise UserError(
      f"{where} is made of {of!r}, which the batch has not; it has: {', '.join(batch)}"
    )
  images = batch[found]
  if images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] != 3:
    raise UserError(
      f"{where} is made of {found!r}, which is no picture but {images.dtype} "
      f"{list(images.shape)}"
    )
  if images.ndim == 4:
    if found != of:
      raise UserError(f"{where} is of {of!r}, but {key!r} is a column too; rename one")
    return images
  if found != key:
    raise UserError(
      f"{where} is cut from whole pictures, but the host has cut {of!r} already and "
      f"has not given {key!r}"
    )
  wanted = (crops.views, crops.size, crops.size)
  if images.shape[1:4] != wanted:
    raise UserError(
      f"{where} has views={crops.views} of size={crops.size}, but the host has cut "
      f"{images.shape[1]} of {images.shape[2]}x{images.shape[3]} pixels"
    )
  return images


def float_image(images: Array) -> Array:
  """From uint8 to float32 in [0, 1]."""
  return images.astype(jnp.float32) / 255


def entry_rng(rng: Array, key: str) -> Array:
  """A key for an entry's draws; "image" has that of the step, the others their own."""
  return rng if key == "image" else jax.random.fold_in(rng, _number(key))


def view_keys(rng: Array, count: int, views: int) -> Array:
  """Keys `[count, views]`: by row of the global batch, then by view."""
  rows = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(fold, (0, None))(rows, jnp.arange(views))


def _draw(rng: Array, count: int, views: int) -> Array:
  """The uniform numbers of the views, `[count, views, UNIFORMS]`."""
  draw = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (UNIFORMS,))))
  return draw(view_keys(rng, count, views))


def _number(key: str) -> int:
  return zlib.crc32(key.encode()) & 0x7FFFFFFF


# The colours: `(given, crops) -> (x [B, V, 3, s, s], uniforms) -> x`, or None where it
# never happens.


def _colours(given: dict, order, crops: CropSet) -> list[Callable]:
  if sorted(order) != sorted(COLOURS):
    raise UserError(
      f"data.augment.{crops.key}.order is {tuple(order)}; "
      f"give each of {', '.join(COLOURS)} once"
    )
  made = [COLOURS[name](given[name], crops) for name in order]
  return [colour for colour in made if colour is not None]


def _jitter(given: dict | None, crops: CropSet):
  where = f"data.augment.{crops.key}.jitter"
  options = _options(where, given, JITTER)
  probability = _probability(where, options["probability"], crops.views)
  if options["brightness"] not in ("multiplicative", "additive"):
    raise UserError(
      f"{where}.brightness is {options['brightness']!r}: use 'multiplicative' or "
      "'additive'"
    )
  if len(options["amounts"]) != 4:
    raise UserError(
      f"{where}.amounts is {options['amounts']}; give four numbers, for brightness, "
      "contrast, saturation and hue"
    )
  additive = options["brightness"] == "additive"
  amounts = [options["strength"] * amount for amount in options["amounts"]]

  def apply(x, uniforms):
    factors = []
    for i, amount in enumerate(amounts):
      is_difference = i == 3 or (i == 0 and additive)
      low = -amount if is_difference else max(1 - amount, 0.0)
      high = amount if is_difference else 1 + amount
      factors.append(_between(uniforms[..., FACTORS.start + i], low, high))
    orders = len(operations.ORDERS)
    order = jnp.floor(uniforms[..., ORDER] * orders).astype(jnp.int32)
    happens = (uniforms[..., JITTERED] < probability)[..., None, None]
    slots = jnp.asarray(operations.SLOTS)[order] & happens
    return operations.jitter_slots(x, factors, slots, additive)

  return apply if probability.any() else None


def _grayscale(given, crops: CropSet):
  where = f"data.augment.{crops.key}.grayscale"
  probability = _probability(where, given, crops.views)

  def apply(x, uniforms):
    happens = operations.per_image(uniforms[..., GRAYED] < probability)
    return jnp.where(happens, operations.grayscale(x), x)

  return apply if probability.any() else None


def _blur(given: dict | None, crops: CropSet):
  where = f"data.augment.{crops.key}.blur"
  options = _options(where, given, BLUR)
  probability = _probability(where, options["probability"], crops.views)
  low, high = rising(f"{where}.sigma", options["sigma"])
  radius = (options["kernel_size"] or crops.size // 10) // 2
  idle = np.zeros((1, 1, 2 * radius + 1), np.float32)
  idle[..., radius] = 1.0

  def apply(x, uniforms):
    sigma = _between(uniforms[..., SIGMA], low, high)
    happens = (uniforms[..., BLURRED] < probability)[..., None]
    taps = jnp.where(happens, operations.gaussian_taps(sigma, radius), idle)
    return operations.blur(x, taps)

  return apply if probability.any() else None


def _solarize(given: dict | None, crops: CropSet):
  where = f"data.augment.{crops.key}.solarize"
  options = _options(where, given, SOLARIZE)
  probability = _probability(where, options["probability"], crops.views)

  def apply(x, uniforms):
    happens = operations.per_image(uniforms[..., SOLARIZED] < probability)
    return jnp.where(happens, operations.solarize(x, options["threshold"]), x)

  return apply if probability.any() else None


COLOURS = {
  "jitter": _jitter,
  "grayscale": _grayscale,
  "blur": _blur,
  "solarize": _solarize,
}


def _between(uniforms: Array, low, high) -> Array:
  return uniforms * (high - low) + low


def _options(where: str, given: dict | None, defaults: dict) -> dict:
  if given is None:
    return {**defaults, "probability": 0.0}
  if unknown := sorted(set(given) - set(defaults)):
    raise UserError(f"{where} has no option {unknown[0]!r}; it has {sorted(defaults)}")
  return {**defaults, **given}


def _probability(where: str, value, views: int) -> np.ndarray:
  """`[1, views]` from one number or one a view."""
  values = np.atleast_1d(np.asarray(value, np.float32))
  if values.shape not in ((1,), (views,)) or (values < 0).any() or (values > 1).any():
    raise UserError(
      f"{where} has the probability {value}: give one number in [0, 1], or one for "
      f"each of the {views} views"
    )
  return np.broadcast_to(values, (1, views))


def rising(where: str, values, most: float = np.inf, zero=False) -> tuple[float, float]:
  """Two numbers, 0 < low <= high <= most; `zero`: low may be 0."""
  pair = tuple(np.atleast_1d(np.asarray(values, float)).tolist())
  if len(pair) != 2 or not (0 if zero else 1e-9) <= pair[0] <= pair[1] <= most:
    raise UserError(
      f"{where} is {values}; give two numbers, rising, from {'' if zero else 'above '}0"
      + (f" to {most}" if np.isfinite(most) else "")
    )
  return pair
