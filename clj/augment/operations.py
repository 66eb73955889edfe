"""The operations on pixels: colours, blur and solarization of planar images.

Images are `[..., 3, H, W]` in [0, 1]. A factor is a scalar, or one an image: of shape
`image.shape[:-3]`. The operations are those of SimCLR (arXiv 2002.05709, appendix A;
brightness of its "v2" implementation) and BYOL (arXiv 2006.07733, appendix B).
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def brightness(image: Array, factor) -> Array:
  """`image * factor`; not clipped. Image `[..., 3, H, W]`."""
  return image * per_image(factor)


def brightness_additive(image: Array, delta) -> Array:
  """`image + delta`, BYOL's brightness; not clipped. Image `[..., 3, H, W]`."""
  return image + per_image(delta)


def contrast(image: Array, factor) -> Array:
  """Scales the distance to the mean of each channel; not clipped."""
  factor = per_image(factor)
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
  return blur(image, gaussian_taps(sigma, kernel_size // 2))


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
  return jitter_slots(image, factors, jnp.asarray(SLOTS[index]), additive)


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


def jitter_slots(image: Array, factors, slots: Array, additive: bool) -> Array:
  """`slots` is `[..., 6, 4]` bool, one table an image; `factors` as above."""
  bright, contrasts, saturations, turns = factors
  for index, kind in enumerate(SEQUENCE):
    on = [slots[..., index, i] for i in range(4)]
    if kind == "affine":
      # Brightness or contrast, as one product and one sum. Two products before the sum
      # would round differently from one compilation to the next.
      factor = jnp.where(on[1], contrasts, 1.0)
      shift = _mean(image) * per_image(1 - factor)
      if additive:
        shift = shift + per_image(jnp.where(on[0], bright, 0.0))
      else:
        factor = jnp.where(on[0], bright, factor)
      shift = jax.lax.optimization_barrier(shift)
      image = jnp.clip(image * per_image(factor) + shift, 0.0, 1.0)
    else:
      factor = jnp.where(on[2], saturations, 1.0)
      shifted = _hsv_shift(image, factor, jnp.where(on[3], turns, 0.0))
      # To HSV and back is exact up to rounding only; an idle slot is exact.
      image = jnp.where(per_image(on[2] | on[3]), jnp.clip(shifted, 0.0, 1.0), image)
  return image


def per_image(factor) -> Array:
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
  factor, delta = per_image(factor), per_image(delta)
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


def gaussian_taps(sigma, radius: int) -> Array:
  """`[..., 2 radius + 1]`, one set of weights a sigma."""
  offsets = np.arange(-radius, radius + 1, dtype=np.float32)
  exponents = [-(float(x) ** 2) / 2 / jnp.square(sigma) for x in offsets]
  weights = jnp.exp(jnp.stack(exponents, axis=-1).astype(jnp.float32))
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def blur(image: Array, taps: Array) -> Array:
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
      per_image(taps[..., i]) * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
      for i in range(2 * radius + 1)
    )
  return image
