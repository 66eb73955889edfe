"""Augmentations on the accelerator: uint8 batches in, float32 views in [0, 1] out.

Inside, images are planar, `[..., 3, H, W]`: a last axis of three fills 3 of the 128
lanes of a TPU and does not vectorise on a CPU. Batches outside are `[B, V, H, W, 3]`.

One key per (seed, step, sample, view): `fold_in(fold_in(rng, row), view)`, with the row
in the global batch. The numbers of a view are drawn from its key at fixed places: to
switch one augmentation off leaves the others as they were, and the same views come out
of any number of devices.

The operations are those of SimCLR (arXiv 2002.05709, appendix A; brightness of its
"v2" implementation) and BYOL (arXiv 2006.07733, appendix B).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from clj.cli import UserError

Array = jax.Array
HIGHEST = jax.lax.Precision.HIGHEST

GRAY = (0.2989, 0.587, 0.114)
ATTEMPTS = 10  # draws of a crop's shape until one fits the image, as torchvision's


# The operations. A factor is a scalar, or one an image: of shape `image.shape[:-3]`.


def brightness(image: Array, factor) -> Array:
  """`image * factor`; not clipped. Image `[..., 3, H, W]`."""
  return image * _per_image(factor)


def brightness_additive(image: Array, delta) -> Array:
  """`image + delta`, BYOL's brightness; not clipped. Image `[..., 3, H, W]`."""
  return image + _per_image(delta)


def contrast(image: Array, factor) -> Array:
  """Scales the distance to the mean of each channel; not clipped."""
  factor = _per_image(factor)
  return image * factor + _mean(image) * (1 - factor)


def saturation(image: Array, factor) -> Array:
  """Multiplies the HSV saturation and clips it to [0, 1]. Image `[..., 3, H, W]`."""
  return _hsv_shift(image, factor, 0.0)


def hue(image: Array, delta) -> Array:
  """Turns the HSV hue by `delta` of a full circle. Image `[..., 3, H, W]`."""
  return _hsv_shift(image, 1.0, delta)


def grayscale(image: Array) -> Array:
  """Three equal channels of luma 0.2989 R + 0.587 G + 0.114 B."""
  red, green, blue = _planes(image)
  luma = 0.2989 * red + 0.587 * green + 0.114 * blue
  return jnp.broadcast_to(luma, image.shape)


def gaussian_blur(image: Array, sigma, kernel_size: int) -> Array:
  """Separable Gaussian of standard deviation `sigma` pixels; zeros outside the image.

  The kernel has `2 * (kernel_size // 2) + 1` taps and sum 1, as in SimCLR and BYOL. The
  blur of Pillow, which PyTorch recipes use, differs at the same sigma.
  """
  return _blur(image, _gaussian_taps(sigma, kernel_size // 2))


def solarize(image: Array, threshold=0.5) -> Array:
  """Inverts pixels at or above the threshold."""
  return jnp.where(image < threshold, image, 1 - image)


OPERATIONS = ("brightness", "contrast", "saturation", "hue")


def color_jitter(
  image: Array,
  factors,
  order: tuple[str, ...] = OPERATIONS,
  additive: bool = False,
) -> Array:
  """The four colour operations in a fixed order, clipped to [0, 1] after each.

  Args:
    image: `[..., 3, H, W]`.
    factors: of brightness (a difference where `additive`), contrast and saturation,
      and the turn of the hue.
    order: a permutation of `OPERATIONS`.
    additive: BYOL's brightness rather than SimCLR's.
  """
  index = ORDERS.index(tuple(OPERATIONS.index(name) for name in order))
  return _jitter(image, factors, jnp.asarray(SLOTS[index]), additive)


# Colour jitter in a random order per image costs every order under `vmap`. Instead all
# 24 orders run through one fixed sequence of six slots, in which a slot does nothing
# (exactly nothing) where the image's order does not need it. Saturation and hue next to
# each other are one conversion to HSV and back, so two conversions are enough.

SEQUENCE = ("affine", "hsv", "affine", "affine", "hsv", "affine")
ORDERS = tuple(itertools.permutations(range(4)))


def _slot_table() -> np.ndarray:
  """`[24, 6, 4]` bool: which operations a slot does in each order."""
  kinds = ("affine", "affine", "hsv", "hsv")
  table = np.zeros((len(ORDERS), len(SEQUENCE), 4), bool)
  for row, order in enumerate(ORDERS):
    slot = -1
    for operation in order:
      kind = kinds[operation]
      together = kind == "hsv" and slot >= 0 and SEQUENCE[slot] == "hsv"
      if not together:
        slot = SEQUENCE.index(kind, slot + 1)
      table[row, slot, operation] = True
  return table


SLOTS = _slot_table()


def _jitter(image: Array, factors, slots: Array, additive: bool) -> Array:
  """`slots` is `[..., 6, 4]` bool, one table an image; `factors` as above."""
  bright, contrasts, saturations, turns = factors
  for index, kind in enumerate(SEQUENCE):
    on = [slots[..., index, i] for i in range(4)]
    if kind == "affine":
      # Brightness or contrast, as one product and one sum. Two products before the sum
      # would round differently from one compilation to the next.
      factor = jnp.where(on[1], contrasts, 1.0)
      shift = _mean(image) * _per_image(1 - factor)
      if additive:
        shift = shift + _per_image(jnp.where(on[0], bright, 0.0))
      else:
        factor = jnp.where(on[0], bright, factor)
      shift = jax.lax.optimization_barrier(shift)
      image = jnp.clip(image * _per_image(factor) + shift, 0.0, 1.0)
    else:
      factor = jnp.where(on[2], saturations, 1.0)
      shifted = _hsv_shift(image, factor, jnp.where(on[3], turns, 0.0))
      # To HSV and back is exact up to rounding only; an idle slot is exact.
      image = jnp.where(_per_image(on[2] | on[3]), jnp.clip(shifted, 0.0, 1.0), image)
  return image


def _per_image(factor) -> Array:
  factor = jnp.asarray(factor)
  return factor[..., None, None, None] if factor.ndim else factor


def _planes(image: Array) -> tuple[Array, Array, Array]:
  return image[..., 0:1, :, :], image[..., 1:2, :, :], image[..., 2:3, :, :]


def _mean(image: Array) -> Array:
  """The mean of every channel, `[..., 3, 1, 1]`.

  A reduction adds in an order of its own for each shape, hence for each number of
  devices; adding halves is the same everywhere, and as fast.
  """
  count = image.shape[-2] * image.shape[-1]
  for axis in (image.ndim - 2, image.ndim - 1):
    while (size := image.shape[axis]) > 1:
      half = size // 2
      total = jax.lax.slice_in_dim(image, 0, half, axis=axis)
      total = total + jax.lax.slice_in_dim(image, half, 2 * half, axis=axis)
      if size % 2:
        rest = jax.lax.slice_in_dim(image, 2 * half, size, axis=axis)
        total = jnp.concatenate([total, rest], axis=axis)
      image = total
  return image / count


def _hsv_shift(image: Array, factor, delta) -> Array:
  """Saturation times `factor`, clipped, and hue plus `delta`, modulo 1."""
  factor, delta = _per_image(factor), _per_image(delta)
  hues, saturations, value = _planes(rgb_to_hsv(image))
  sixths = jnp.mod(6 * (hues + delta), 6.0)
  chroma = value * jnp.clip(saturations * factor, 0.0, 1.0)

  def channel(offset):
    place = sixths + offset
    place = jnp.where(place >= 6, place - 6, place)
    return value - chroma * jnp.clip(jnp.minimum(place, 4 - place), 0.0, 1.0)

  return jnp.concatenate([channel(5.0), channel(3.0), channel(1.0)], axis=-3)


def rgb_to_hsv(image: Array) -> Array:
  """Hue, saturation and value in [0, 1], planar; the hue of grey is 0."""
  red, green, blue = _planes(image)
  value = jnp.maximum(jnp.maximum(red, green), blue)
  chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
  inverse = 1 / jnp.where(chroma > 0, chroma, 1.0)
  # Never `value == red`: compiled, the two may have been rounded differently.
  sixths = jnp.where(
    (red >= green) & (red >= blue),
    (green - blue) * inverse,
    jnp.where(green >= blue, 2 + (blue - red) * inverse, 4 + (red - green) * inverse),
  )
  hues = jnp.where(sixths < 0, sixths + 6, sixths) / 6
  saturations = chroma / jnp.where(value > 0, value, 1.0)
  return jnp.concatenate([hues, saturations, value], axis=-3)


def _gaussian_taps(sigma, radius: int) -> Array:
  """`[..., 2 radius + 1]`, one set of weights a sigma."""
  offsets = np.arange(-radius, radius + 1, dtype=np.float32)
  exponents = [-(float(x) ** 2) / 2 / jnp.square(sigma) for x in offsets]
  weights = jnp.exp(jnp.stack(exponents, axis=-1).astype(jnp.float32))
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _blur(image: Array, taps: Array) -> Array:
  """Correlates columns, then rows, with `taps` `[..., 2 radius + 1]`, one set an image.

  Shifted sums rather than a convolution: per-image kernels cost nothing extra.
  """
  radius = taps.shape[-1] // 2
  for axis in (image.ndim - 2, image.ndim - 1):
    size = image.shape[axis]
    pad = [(0, 0)] * image.ndim
    pad[axis] = (radius, radius)
    padded = jnp.pad(image, pad)
    image = sum(
      _per_image(taps[..., i]) * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
      for i in range(2 * radius + 1)
    )
  return image


# Random resized crop: two matrix products an image, the flip folded into one of them.


def crop_boxes(uniforms: Array, height: int, width: int, scale, ratio):
  """Boxes `(top, left, height, width)` of random resized crops, whole pixels.

  The area is uniform in `scale` times the image's, the aspect ratio log-uniform in
  `ratio`; a shape that does not fit the image is drawn again, up to ten times, and
  then cut to fit. The position is uniform. As in torchvision, and up to the uniform
  rather than log-uniform ratio, as in SimCLR's TensorFlow code.

  Args:
    uniforms: `[..., 2 * ATTEMPTS + 2]` in [0, 1).
  """
  areas = uniforms[..., :ATTEMPTS] * (scale[1] - scale[0]) + scale[0]
  low, high = np.log(ratio[0]), np.log(ratio[1])
  root = jnp.exp((uniforms[..., ATTEMPTS : 2 * ATTEMPTS] * (high - low) + low) / 2)
  side = jnp.sqrt(areas * (height * width))
  widths, heights = jnp.round(side * root), jnp.round(side / root)
  fits = (widths <= width) & (heights <= height)
  first = jnp.argmax(fits, axis=-1)[..., None]  # 0 where none fits

  def pick(sizes, limit):
    return jnp.clip(jnp.take_along_axis(sizes, first, axis=-1)[..., 0], 1.0, limit)

  box_height, box_width = pick(heights, height), pick(widths, width)
  top = jnp.floor(uniforms[..., -2] * (height - box_height + 1))
  left = jnp.floor(uniforms[..., -1] * (width - box_width + 1))
  return top, left, box_height, box_width


def resize_weights(start: Array, length: Array, size: int, out: int) -> Array:
  """`[..., out, size]`: resamples `[start, start + length)` of an axis to `out` points.

  Keys' cubic kernel (a = -0.5, TensorFlow's and Pillow's bicubic), stretched where the
  crop is shrunk, so that it does not alias (as Pillow does; TensorFlow does not), with
  pixels outside of the crop left out.
  """
  start, length = start[..., None, None], length[..., None, None]
  centers = (np.arange(out, dtype=np.float32) + 0.5)[:, None]
  pixels = np.arange(size, dtype=np.float32)[None, :]
  centers = centers.reshape((1,) * (start.ndim - 2) + centers.shape)
  pixels = pixels.reshape((1,) * (start.ndim - 2) + pixels.shape)
  step = length / out
  x = jnp.abs(start + centers * step - (pixels + 0.5)) / jnp.maximum(step, 1.0)
  near = ((1.5 * x - 2.5) * x) * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  weights = jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
  inside = (pixels >= start) & (pixels < start + length)
  weights = jnp.where(inside, weights, 0.0)
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def crop_resize(images: Array, boxes, flip: Array, size: int) -> Array:
  """Crops `[B, H, W, 3]` by boxes of `[B, V]` to planar views `[B, V, 3, size, size]`.

  `flip` `[B, V]` bool mirrors a view left to right. The bicubic kernel overshoots; the
  result is clipped to the range [0, 1] of the images.
  """
  top, left, height, width = boxes
  rows = resize_weights(top, height, images.shape[1], size)
  columns = resize_weights(left, width, images.shape[2], size)
  columns = jnp.where(flip[..., None, None], columns[..., ::-1, :], columns)
  x = jnp.einsum("bvyh,bhwc->bvycw", rows, images, precision=HIGHEST)
  x = jnp.einsum("bvycw,bvxw->bvcyx", x, columns, precision=HIGHEST)
  return jnp.clip(x, 0.0, 1.0)


# The pipeline.

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


def make(
  *,
  size: int,
  views: int = 2,
  crop_scale: tuple[float, float] = (0.08, 1.0),
  crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
  flip=0.5,
  jitter: dict | None = None,
  grayscale=0.2,
  blur: dict | None = None,
  solarize: dict | None = None,
  crops: dict | None = None,
):
  """Builds `augment(rng, batch) -> batch`, the augmentation inside the train step.

  `batch["image"]` goes from uint8 `[B, V, H, W, 3]` to float32 `[B, views, size, size,
  3]` in [0, 1]. With V = 1 < `views`, or where V = 1 picture has not the size of the
  view, each view is a random resized crop of the one picture; with V = `views` pictures
  of `size` the host has cropped already, or there is nothing to crop, and only the rest
  is done here: flip, colour jitter, grayscale, blur, solarize, in this order. Nothing
  else in the batch is touched but `crops`.

  Every probability is a number, or one number a view (BYOL's pair: blur (1.0, 0.1),
  solarize (0.0, 0.2)). What has probability 0 in all views costs nothing.

  Args:
    size: side of the views, pixels.
    views: number of views.
    crop_scale: range of the crop's area, as a share of the picture's.
    crop_ratio: range of the crop's width over height.
    flip: probability of mirroring left to right.
    jitter: dict of `strength`, `probability`, `brightness` ("multiplicative" as in
      SimCLR, "additive" as in BYOL) and `amounts`: how far brightness, contrast,
      saturation and hue may go at strength 1. None: no jitter. Defaults: `JITTER`.
    grayscale: probability of dropping the colour.
    blur: dict of `probability`, `sigma` (range, pixels) and `kernel_size` (pixels; a
      tenth of `size` where None). None: no blur. Defaults: `BLUR`.
    solarize: dict of `probability` and `threshold`. None: none. Defaults: `SOLARIZE`.
    crops: arguments of this function (`size`, `views`, ...) for a second set of views,
      `batch["crops"]`: as given by the host, or cut from `image` where V = 1. What it
      leaves out is as for `image`.

  Raises:
    ValueError: an option that does not exist, or does not fit the views or the batch.
  """
  shared = {
    "crop_scale": crop_scale,
    "crop_ratio": crop_ratio,
    "flip": flip,
    "jitter": jitter,
    "grayscale": grayscale,
    "blur": blur,
    "solarize": solarize,
  }
  image_views = _views(size=size, views=views, **shared)
  crop_views = None if crops is None else _views(**{**shared, **crops})

  def augment(rng, batch):
    pictures = batch["image"]
    out = {"image": image_views(rng, pictures, 0)}
    if crop_views is not None:
      # Small crops that the host made, or else crops of the one picture.
      out["crops"] = crop_views(rng, batch.get("crops", pictures), views)
    return {**batch, **out}

  return augment


def to_float(batch: dict) -> dict:
  """`image` (and `crops`) from uint8 to float32 in [0, 1], for evaluation."""
  images = {k: _to_float(batch[k]) for k in ("image", "crops") if k in batch}
  return {**batch, **images}


def _to_float(images: Array) -> Array:
  return images.astype(jnp.float32) / 255


def _views(
  *, size, views, crop_scale, crop_ratio, flip, jitter, grayscale, blur, solarize
):
  """One set of views: `(rng, uint8 [B, V, H, W, 3], first view) -> [B, views, ...]`."""
  jitter = _options("jitter", jitter, JITTER)
  blur = _options("blur", blur, BLUR)
  solarize = _options("solarize", solarize, SOLARIZE)
  flip = _probability("flip", flip, views)
  grayscale = _probability("grayscale", grayscale, views)
  jittered = _probability("jitter", jitter["probability"], views)
  blurred = _probability("blur", blur["probability"], views)
  solarized = _probability("solarize", solarize["probability"], views)
  if jitter["brightness"] not in ("multiplicative", "additive"):
    raise UserError(
      f"jitter brightness {jitter['brightness']!r}: use 'multiplicative' or 'additive'"
    )
  additive = jitter["brightness"] == "additive"
  kernel_size = blur["kernel_size"] or size // 10

  def augment(rng, images, first_view):
    count, given = images.shape[:2]
    if given not in (1, views):
      raise UserError(
        f"{given} views of every image, but views={views}: give 1 or {views}"
      )
    keys = _keys(rng, count, views, first_view)
    draw = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (UNIFORMS,))))
    uniforms = draw(keys)

    def happens(place, probability):
      return uniforms[..., place] < probability

    def between(place, low, high):
      return uniforms[..., place] * (high - low) + low

    mirrored = happens(FLIP, flip)
    height, width = images.shape[2:4]
    if given == 1 and (views > 1 or (height, width) != (size, size)):
      boxes = crop_boxes(uniforms[..., CROP], height, width, crop_scale, crop_ratio)
      x = crop_resize(_to_float(images[:, 0]), boxes, mirrored, size)
    else:
      if (height, width) != (size, size):
        raise UserError(
          f"crops of {height}x{width} pixels from the host, but size={size}"
        )
      x = _to_float(jnp.moveaxis(images, -1, -3))
      if flip.any():
        x = jnp.where(_per_image(mirrored), x[..., ::-1], x)

    if jittered.any():
      amounts = [jitter["strength"] * amount for amount in jitter["amounts"]]
      factors = []
      for i, amount in enumerate(amounts):
        is_difference = i == 3 or (i == 0 and additive)
        low = -amount if is_difference else max(1 - amount, 0.0)
        high = amount if is_difference else 1 + amount
        factors.append(between(FACTORS.start + i, low, high))
      order = jnp.floor(uniforms[..., ORDER] * len(ORDERS)).astype(jnp.int32)
      slots = jnp.asarray(SLOTS)[order] & happens(JITTERED, jittered)[..., None, None]
      x = _jitter(x, factors, slots, additive)
    if grayscale.any():
      x = jnp.where(_per_image(happens(GRAYED, grayscale)), _gray(x), x)
    if blurred.any():
      taps = _gaussian_taps(between(SIGMA, *blur["sigma"]), kernel_size // 2)
      idle = np.zeros(taps.shape[-1], np.float32)
      idle[kernel_size // 2] = 1.0
      on = happens(BLURRED, blurred)[..., None]
      x = _blur(x, jnp.where(on, taps, idle.reshape(1, 1, -1)))
    if solarized.any():
      x = jnp.where(
        _per_image(happens(SOLARIZED, solarized)), _solar(x, solarize["threshold"]), x
      )
    return jnp.moveaxis(x, -3, -1)

  return augment


# Inside `make`, options have the names of these two operations.
_gray = grayscale
_solar = solarize


def _keys(rng: Array, count: int, views: int, first_view: int) -> Array:
  """Keys `[count, views]`: by row of the global batch, then by view."""
  rows = jax.vmap(jax.random.fold_in, (None, 0))(rng, jnp.arange(count))
  fold = jax.vmap(jax.random.fold_in, (None, 0))
  return jax.vmap(fold, (0, None))(rows, first_view + jnp.arange(views))


def _options(name: str, given: dict | None, defaults: dict) -> dict:
  if given is None:
    return {**defaults, "probability": 0.0}
  unknown = sorted(set(given) - set(defaults))
  if unknown:
    raise UserError(f"{name} has no option {unknown[0]!r}; it has {sorted(defaults)}")
  return {**defaults, **given}


def _probability(name: str, value, views: int) -> np.ndarray:
  """`[1, views]` from one number or one a view."""
  values = np.atleast_1d(np.asarray(value, np.float32))
  if values.shape not in ((1,), (views,)) or (values < 0).any() or (values > 1).any():
    raise UserError(
      f"{name} probability {value}: give one number in [0, 1], or one for each of the "
      f"{views} views"
    )
  return np.broadcast_to(values, (1, views))
