"""Random resized crops: two matrix products an image, the flip folded into one."""

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
HIGHEST = jax.lax.Precision.HIGHEST

ATTEMPTS = 10  # draws of a crop's shape until one fits the image, as torchvision's


def crop_boxes(uniforms: Array, height: int, width: int, scale, ratio):
  """Boxes `(top, left, height, width)` of random resized crops, whole pixels.

  The area is uniform in `scale` times the image's, the aspect ratio log-uniform in
  `ratio`; a shape that does not fit the image is drawn again, up to ten times, and
  then cut to fit. The position is uniform. As in torchvision, and up to the uniform
  rather than log-uniform ratio, as in SimCLR's TensorFlow code. A `scale` of (1, 1) is
  the whole picture, whatever its shape.

  Args:
    uniforms: `[..., 2 * ATTEMPTS + 2]` in [0, 1).
    height, width: of the image, pixels.
  """
  if scale[0] >= 1:
    start = jnp.zeros(uniforms.shape[:-1], jnp.float32)
    return start, start, start + height, start + width
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
