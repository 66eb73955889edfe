"""Encoded pictures to uint8 arrays, and the host's share of cropping and resizing."""

import io
import math
import re

import cv2
import numpy as np
from PIL import Image, ImageOps

from clj.data.order import uniform

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
    ValueError: `data` is no picture, or a broken or truncated one.
  """
  # OpenCV is faster and releases the GIL throughout; what it does not treat as above
  # goes to Pillow. A JPEG without an end marker too: OpenCV 4 fills up with grey.
  if data[:2] == b"\xff\xd8":
    whole = data[-64:].rstrip(b"\0\r\n").endswith(b"\xff\xd9")
    picture = _opencv(data, cv2.IMREAD_COLOR_RGB) if whole else None
  elif any(mark in data for mark in (b"eXIf", b"EXIF", b"tRNS")):
    picture = None
  else:
    picture = _opencv(data, cv2.IMREAD_UNCHANGED)
    if picture is not None and picture.dtype == np.uint16:
      picture = (picture >> 8).astype(np.uint8)
    if picture is not None and picture.ndim == 2:
      picture = cv2.cvtColor(picture, cv2.COLOR_GRAY2RGB)
    elif picture is not None and picture.shape[2] == 3:
      picture = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
  if picture is None or picture.dtype != np.uint8 or picture.shape[2] != 3:
    return _pillow(data)
  return picture


def _opencv(data, flags):
  try:
    return cv2.imdecode(np.frombuffer(data, np.uint8), flags)
  except cv2.error:
    return None


def _pillow(data):
  try:
    with Image.open(io.BytesIO(data)) as image:
      return from_pillow(image)
  except Exception as error:  # Pillow raises a dozen kinds on broken data.
    message = re.sub(r" <_io\.BytesIO object at \w+>", "", str(error)) or repr(error)
    raise ValueError(message) from None


def from_pillow(image: Image.Image) -> np.ndarray:
  """Pixels of a Pillow picture of any mode, by the rules of `decode`."""
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith("I"):
    return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[..., None], 3, 2)
  if image.mode == "F":
    raise ValueError("pixels are floating-point numbers")
  if image.has_transparency_data:
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return np.array(image.convert("RGB"))


def crop_randomly(
  picture: np.ndarray, size: int, chances: np.ndarray, scale, ratio
) -> np.ndarray:
  """A random-resized crop: what `clj.augment` does to pictures of one size.

  The area is uniform in `scale` times the picture's, the aspect log-uniform in `ratio`;
  a shape that does not fit is drawn again, up to ten times, and then cut to fit. The
  place is uniform.

  Args:
    picture: uint8 [H, W, 3].
    size: side of the result, pixels.
    chances: [22], uniform in [0, 1): ten areas, ten aspects, row and column.
    scale: least and greatest part of the picture's area.
    ratio: least and greatest width / height.

  Returns:
    uint8 [size, size, 3]. Where the crop shrinks, every pixel is an average of the area
    it stands for (nothing aliases); where it grows, it is bicubic.
  """
  height, width, _ = picture.shape
  area = height * width * (scale[0] + chances[:10] * (scale[1] - scale[0]))
  low, high = math.log(ratio[0]), math.log(ratio[1])
  aspect = np.exp(low + chances[10:20] * (high - low))
  wide, tall = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
  first = ((wide <= width) & (tall <= height)).argmax()  # 0 where none fits.
  w = int(min(max(wide[first], 1), width))
  h = int(min(max(tall[first], 1), height))
  top = int(chances[20] * (height - h + 1))
  left = int(chances[21] * (width - w + 1))
  crop = picture[top : top + h, left : left + w]
  method = cv2.INTER_AREA if h >= size and w >= size else cv2.INTER_CUBIC
  return cv2.resize(crop, (size, size), interpolation=method)


def crop_chances(seed: int, position: int, views: int) -> np.ndarray:
  """What `crop_randomly` needs for each view at a position of the stream, [V, 22]."""
  return uniform(seed, position, np.arange(views)[:, None], np.arange(22))


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
  if crop:
    # torchvision rounds the longer side down, and the margins to even numbers.
    target, shorter = round(size / crop), min(height, width)
    height, width = (int(target * side / shorter) for side in (height, width))
  else:
    height = width = size
  resized = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
  top, left = round((height - size) / 2), round((width - size) / 2)
  return np.asarray(resized)[top : top + size, left : left + size]


def fit(picture: np.ndarray, height: int, width: int) -> np.ndarray:
  """The central part of the same aspect, resized; uint8 [height, width, 3].

  As little as possible is cut away; Pillow's bicubic filter, antialiased.
  """
  H, W, _ = picture.shape
  if (height, width) == (H, W):
    return picture
  factor = min(H / height, W / width)
  h, w = factor * height, factor * width
  box = ((W - w) / 2, (H - h) / 2, (W + w) / 2, (H + h) / 2)
  image = Image.fromarray(picture)
  return np.asarray(image.resize((width, height), Image.Resampling.BICUBIC, box))
