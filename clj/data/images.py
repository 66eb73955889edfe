"""Encoded pictures to uint8 arrays, and the host's share of cropping and resizing."""

import functools
import io
import math
import re
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageOps, TiffImagePlugin

from clj.data.order import uniform

MAX_PIXELS = 50_000_000  # A PNG of 18 KB can hold 12,000 x 12,000.
_ORIENTATION = 0x0112  # EXIF's tag; from 5 on rows and columns are exchanged.

# Pictures are decoded side by side in threads of our own, and a broken one is reported
# by us: OpenCV's threads and messages would only get in the way.
cv2.setNumThreads(1)
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)


def decode(data: bytes) -> np.ndarray:
  """Decodes a picture of any common format, told by its content.

  The picture stands upright by its EXIF orientation. Grey, palette and CMYK become RGB
  by Pillow's formulas (a CMYK JPEG may differ by 1), of 16 bits the upper 8 are kept,
  and what is transparent shows white. Colour profiles are not applied; of an animation
  the first picture is taken.

  Returns:
    uint8 [H, W, 3], RGB.

  Raises:
    ValueError: `data` is no picture, a broken or truncated one, one of floating-point
      numbers or integers of more than 16 bits, or has more than `MAX_PIXELS` (it is not
      decoded then).
  """
  # OpenCV is faster and releases the GIL throughout; what it does not treat as above
  # goes to Pillow. A JPEG without an end marker too: OpenCV 4 fills up with grey.
  picture = None
  if data[:2] == b"\xff\xd8":
    shape, _ = _jpeg_header(data)
    if shape and _is_whole(data):
      _check_size(*shape)
      picture = _opencv(data, cv2.IMREAD_COLOR_RGB)
  elif data[4:8] != b"ftyp" and not any(m in data for m in (b"eXIf", b"EXIF", b"tRNS")):
    if shape := _shape(data):
      _check_size(*shape)
      picture = _opencv(data, cv2.IMREAD_UNCHANGED)
    if picture is not None and picture.dtype == np.uint16:
      picture = (picture >> 8).astype(np.uint8)
    if picture is not None and picture.dtype == np.uint8:
      if picture.ndim == 2:
        picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
      elif picture.shape[2] == 3:
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
  if picture is None or picture.dtype != np.uint8 or picture.shape[2:] != (3,):
    return _pillow(data)
  return picture


def _check_size(height, width):
  if height * width > MAX_PIXELS:
    raise ValueError(
      f"refused: {width} x {height} pixels, over {MAX_PIXELS // 10**6} megapixels"
    )


def _is_whole(data):
  """Whether a JPEG has its end marker."""
  return data[-64:].rstrip(b"\0\r\n").endswith(b"\xff\xd9")


def _jpeg_header(data):
  """Height and width as they are stored, and the EXIF segment: (None, b"") of a JPEG
  whose segments do not follow one another."""
  at, exif = 2, b""
  while at + 9 <= len(data) and data[at] == 0xFF:
    marker = data[at + 1]
    if marker == 0xFF:  # Any number of these may come before a marker.
      at += 1
    elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # Those without a length.
      at += 2
    elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
      return struct.unpack_from(">HH", data, at + 5), exif
    else:
      end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
      if marker == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
        exif = data[at + 4 : end]
      at = end
  return None, b""


def _shape(data):
  """Height and width of a picture that is no JPEG, by its header; None: not known."""
  if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
    width, height = struct.unpack_from(">II", data, 16)
    return height, width
  file = io.BytesIO(data)
  try:
    if data[:4] in (b"II*\0", b"MM\0*"):  # Pillow opens fewer kinds than OpenCV.
      tags = TiffImagePlugin.ImageFileDirectory_v2(data[:8])
      file.seek(tags.next)
      tags.load(file)
      return tags[TiffImagePlugin.IMAGELENGTH], tags[TiffImagePlugin.IMAGEWIDTH]
    with Image.open(file) as image:
      return image.height, image.width
  except Exception:  # As in `_pillow`, which says then what is wrong.
    return None


def _opencv(data, flags):
  try:
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
  except cv2.error:
    return None


def _pillow(data):
  try:
    with Image.open(io.BytesIO(data)) as image:
      return from_pillow(image)
  except Image.DecompressionBombError:
    raise ValueError(f"refused: over {MAX_PIXELS // 10**6} megapixels") from None
  except Exception as error:  # Pillow raises a dozen kinds on broken data.
    message = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error)) or repr(error)
    raise ValueError(message) from None


def from_pillow(image: Image.Image) -> np.ndarray:
  """Pixels of a Pillow picture of any mode, by the rules of `decode`."""
  _check_size(image.height, image.width)
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):
    values = np.asarray(image)
    if values.size and not 0 <= values.min() <= values.max() < 65536:
      raise ValueError(
        f"pixels are integers from {values.min()} to {values.max()}, more than 16 bits"
      )
    return np.repeat((values >> 8).astype(np.uint8)[..., None], 3, 2)
  if image.mode == "F":
    raise ValueError("pixels are floating-point numbers")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return np.array(image.convert("RGB"))


class CropSet(NamedTuple):
  """Crops of one size that are cut out of a picture.

  key: what they are called. size: side, pixels. views: how many. scale, ratio: least
  and greatest part of the picture's area, and width / height. boxes_of: the key of
  another set, whose boxes, the first `views` of them, these are at their own size;
  "": drawn by themselves.
  """

  key: str
  size: int
  views: int
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  boxes_of: str = ""


def crops(
  data: bytes | np.ndarray, sets: Sequence[CropSet], seed: int, position: int
) -> dict[str, np.ndarray]:
  """Random-resized crops, every one cut out of the whole picture.

  Args:
    data: an encoded picture, as for `decode`, or uint8 [H, W, 3].
    sets: what to cut; the boxes are those of `boxes`.
    seed, position: key the random numbers.

  Returns:
    {key: uint8 [views, size, size, 3]}. Where a crop shrinks, every pixel is an average
    of the area it stands for (nothing aliases); where it grows, it is bicubic.

    The average, where an axis shrinks by s < 3: bicubic between means over an odd
    number of pixels, the outermost two weighted so that the variance of a mean is
    (s**2 - 1) / 6, which comes closest to Pillow's antialiased bicubic, that of most
    recipes: half of all photographs are within 41 dB (PSNR), nine of ten within 36 dB,
    as with exact means of areas. From 3 on along both axes it is these.

    Where every crop of a JPEG shrinks by four or more, the JPEG is decoded at 1/2 (by
    eight or more: at 1/4) in libjpeg's transform and its boxes are rounded to as many
    pixels: as close to Pillow's filter, 40 and 37 dB (medians) from the full decoding.

  Raises:
    ValueError: as `decode` and `boxes`.
  """
  part, found = 1, None
  picture = data
  if isinstance(data, bytes):
    picture, part, found = _decode_reduced(data, sets, seed, position)
    picture = decode(data) if picture is None else picture
  if found is None:
    found = boxes(picture.shape[:2], sets, seed, position)
  made = {}
  for key, size, views, *_ in sets:
    made[key] = out = np.empty((views, size, size, 3), np.uint8)
    for i, box in enumerate(found[key].tolist()):
      _resize(picture, _rounded(box, part, picture.shape), size, out[i])
  return made


def boxes(
  shape: tuple[int, int], sets: Sequence[CropSet], seed: int, position: int
) -> dict[str, np.ndarray]:
  """The boxes of `crops` in a picture of `shape` [H, W].

  The area is uniform in a set's `scale` times the picture's, the aspect log-uniform in
  its `ratio`; a shape that does not fit is drawn again, up to ten times, and then cut
  to fit. A `scale` of (1, 1) is the whole picture, whatever its shape. The place is
  uniform. The draws of the first set are those of `crop_chances`; the others' are keyed
  by the name of the set too, so that none depends on which sets come with it.

  Returns:
    {key: int64 [views, 4]}: top, left, height and width, pixels.

  Raises:
    ValueError: `boxes_of` is no set that draws its own boxes, or has fewer views.
  """
  views, limits, rows = _plan(tuple(sets))
  drawn = _boxes(*shape, uniform(seed, position, views, np.arange(22)), *limits)
  return {key: drawn[mine] for key, mine in rows.items()}


@functools.lru_cache(maxsize=16)
def _plan(sets):
  """The last word but one that each view is drawn by, [N, 1], the limits of its area
  and of the logarithm of its aspect, four of [N, 1], and {key: its rows}."""
  own = [one for one in sets if not one.boxes_of]
  views, limits, rows = [], [], {}
  for one in own:
    # The first set draws as `crop_chances`.
    base = (zlib.crc32(one.key.encode()) + 1) << 20 if views else 0
    rows[one.key] = slice(len(views), len(views) + one.views)
    views += range(base, base + one.views)
    limits += [(*one.scale, *map(math.log, one.ratio))] * one.views
  found = {}
  for one in sets:
    mine = rows.get(one.boxes_of or one.key)
    if mine is None or mine.stop - mine.start < one.views:
      have = ", ".join(f"{other.key} ({other.views} views)" for other in own) or "none"
      raise ValueError(
        f"crops {one.key!r}: boxes_of={one.boxes_of!r} for {one.views} views; sets that"
        f" draw their own boxes: {have}"
      )
    found[one.key] = slice(mine.start, mine.start + one.views)
  return np.array(views)[:, None], np.array(limits).T[..., None], found


def crop_chances(seed: int, position: int, views: int) -> np.ndarray:
  """What the box of each view at a position of the stream is drawn from, [V, 22].

  Uniform in [0, 1): ten areas, ten aspects, row and column.
  """
  return uniform(seed, position, np.arange(views)[:, None], np.arange(22))


def crop_randomly(
  picture: np.ndarray, size: int, chances: np.ndarray, scale, ratio
) -> np.ndarray:
  """One crop of `crops`, uint8 [size, size, 3], by a row of `crop_chances`."""
  limits = (*scale, *map(math.log, ratio))
  (box,) = _boxes(*picture.shape[:2], chances[None], *limits).tolist()
  return _resize(picture, box, size)


def _boxes(height, width, chances, least, most, low, high):
  """Boxes [N, 4] by `chances` [N, 22] and limits that broadcast to [N, 1]."""
  area = height * width * (least + chances[:, :10] * (most - least))
  aspect = np.exp(low + chances[:, 10:20] * (high - low))
  wide, tall = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
  whole = np.asarray(least) >= 1
  wide, tall = np.where(whole, width, wide), np.where(whole, height, tall)
  first = ((wide <= width) & (tall <= height)).argmax(1)  # 0 where none fits.
  found, rows = [], np.arange(len(chances))
  shapes = zip(wide[rows, first].tolist(), tall[rows, first].tolist())
  for (w, h), (row, column) in zip(shapes, chances[:, 20:].tolist()):
    w, h = int(min(max(w, 1), width)), int(min(max(h, 1), height))
    found.append((int(row * (height - h + 1)), int(column * (width - w + 1)), h, w))
  return np.array(found)


_REDUCED = {2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}


def _decode_reduced(data, sets, seed, position):
  """A JPEG at a part of its size, which part, and the boxes in the whole picture;
  (None, 1, None) where it is needed at full size."""
  full = None, 1, None
  shape, exif = _jpeg_header(data) if data[:2] == b"\xff\xd8" else (None, b"")
  if not shape or min(shape) < 4 * max(one.size for one in sets):
    return full
  if exif and _orientation(exif) >= 5:
    shape = shape[::-1]
  found = boxes(shape, sets, seed, position)
  shrinks = min(found[one.key][:, 2:].min() / one.size for one in sets)
  part = 4 if shrinks >= 8 else 2 if shrinks >= 4 else 1
  if part == 1 or not _is_whole(data):
    return full
  _check_size(*shape)
  picture = _opencv(data, _REDUCED[part])
  reduced = tuple(-(-side // part) for side in shape)
  if picture is None or picture.shape != (*reduced, 3):
    return full
  return cv2.cvtColor(picture, cv2.COLOR_BGR2RGB), part, found


def _orientation(exif):
  try:
    tags = Image.Exif()
    tags.load(exif)
    return int(tags.get(_ORIENTATION, 1))
  except Exception:  # As in `_pillow`.
    return 1


def _rounded(box, part, shape):
  """A box of the whole picture in one of `shape`, decoded at 1 / `part`."""
  if part == 1:
    return box
  top, left, height, width = (round(x / part) for x in box)
  return top, left, min(height, shape[0] - top), min(width, shape[1] - left)


def _resize(picture, box, size, out=None):
  """Cuts a box out and resizes it, as `crops` describes."""
  top, left, height, width = box
  crop = picture[top : top + height, left : left + width]
  most = 3 * size  # From here on the averages below are too wide.
  if height > most or width > most:
    if height >= most and width >= most:
      return cv2.resize(crop, (size, size), dst=out, interpolation=cv2.INTER_AREA)
    height, width = min(height, most), min(width, most)
    crop = cv2.resize(crop, (width, height), interpolation=cv2.INTER_AREA)
  if height > size or width > size:
    across, down = _averages(width, size), _averages(height, size)
    if len(across) > 1 or len(down) > 1:
      border = cv2.BORDER_REFLECT_101
      crop = cv2.sepFilter2D(crop, -1, across, down, borderType=border)
  return cv2.resize(crop, (size, size), dst=out, interpolation=cv2.INTER_CUBIC)


@functools.lru_cache(maxsize=4096)
def _averages(length, size):
  """Weights over 2r + 1 pixels, equal but for the outermost two, of the variance that
  an axis shrunk from `length` to `size` needs."""
  variance = ((length / size) ** 2 - 1) / 6
  r = 1
  while r * (r + 1) / 3 < variance:  # The variance of 2r + 1 equal weights.
    r += 1
  inner = (r - 1) * r * (2 * r - 1) / 3  # The sum of squares of the inner ones.
  outermost = (inner - variance * (2 * r - 1)) / (2 * (variance - r**2))
  if length <= size or (r == 1 and outermost < 1 / 64):  # Next to nothing.
    return np.ones(1)
  weights = np.ones(2 * r + 1)
  weights[[0, -1]] = outermost
  return weights / weights.sum()


def crop_centrally(picture: np.ndarray, size: int, crop: float = 0.875) -> np.ndarray:
  """The picture for evaluation, uint8 [size, size, 3]; Pillow's antialiased bicubic.

  The shorter side is resized to size / crop and the central square is cut out: crop is
  0.875 in most recipes (256 for 224), 1 in CLIP's, the pixels being those of
  torchvision's Resize and CenterCrop. With crop 0 the whole picture is squashed into
  the square, as SigLIP does. A picture that has the size already stays as it is.
  """
  height, width, _ = picture.shape
  if (height, width) == (size, size):
    return picture
  if not crop:
    return _pillow_resize(picture, size, size)
  # torchvision rounds the longer side down, and the margins to even numbers.
  target, shorter = round(size / crop), min(height, width)
  tall, wide = (int(target * side / shorter) for side in (height, width))
  top, left = round((tall - size) / 2), round((wide - size) / 2)
  if target > shorter and max(tall, wide) > 4 * target:
    # 6000 x 1 pixels would become 1,536,000 x 256. Pillow resizes rows first, and each
    # by itself, then columns: here those that are kept, and the pixels that they need.
    if wide > tall:
      columns = _bicubic(picture.swapaxes(0, 1), wide, left, size).swapaxes(0, 1)
      return _pillow_resize(columns, tall, size)[top : top + size]
    first = max(top * height // tall - 4, 0)
    rows = picture[first : (top + size) * height // tall + 5]
    rows = _pillow_resize(rows, len(rows), wide)[:, left : left + size]
    return _bicubic(rows, tall, top, size, first, height)
  return _pillow_resize(picture, tall, wide)[top : top + size, left : left + size]


def _pillow_resize(picture, height, width):
  image = Image.fromarray(np.ascontiguousarray(picture))
  return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))


def _bicubic(rows, new, start, count, first=0, height=None):
  """Rows `start` to `start + count` of the `new` that Pillow's bicubic filter makes of
  `height`, of which `rows` are those from `first` on; to the bit."""
  height = height or len(rows)
  scale = height / new
  stretch = max(scale, 1.0)
  centers = (start + np.arange(count) + 0.5) * scale
  low = np.maximum((centers - 2 * stretch + 0.5).astype(int), 0)
  stop = np.minimum((centers + 2 * stretch + 0.5).astype(int), height)
  taps = low[:, None] + np.arange((stop - low).max())
  x = np.abs(taps - centers[:, None] + 0.5) / stretch
  near = (1.5 * x - 2.5) * x * x + 1
  far = ((-0.5 * x + 2.5) * x - 4) * x + 2
  weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
  weights = np.where(taps < stop[:, None], weights, 0.0)
  weights /= weights.sum(1, keepdims=True)
  # 22 bits after the point, rounded half away from zero.
  weights = np.trunc(weights * 2**22 + np.copysign(0.5, weights)).astype(np.int32)
  taps = np.minimum(taps - first, len(rows) - 1)  # What is past `stop` weighs nothing.
  total = np.full((count, *rows.shape[1:]), 1 << 21, np.int32)
  for tap, weight in zip(taps.T, weights.T):
    total += weight[:, None, None] * rows[tap]
  return np.clip(total >> 22, 0, 255).astype(np.uint8)


def fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
  """The central part of the same aspect, resized; uint8 [height, width, 3].

  As little as possible is cut away; Pillow's bicubic filter, antialiased.
  """
  H, W, _ = picture.shape
  if (height, width) == (H, W):
    return picture
  factor = min(H / height, W / width)
  h, w = factor * height, factor * width
  # Rounding may make a side longer than the picture's, which Pillow refuses.
  left, top = max((W - w) / 2, 0), max((H - h) / 2, 0)
  box = (left, top, min((W + w) / 2, W), min((H + h) / 2, H))
  image = Image.fromarray(picture)
  return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))
