"""Crops of photographs on the host, and what is decoded and what is refused."""

import io
import math
import struct
import tracemalloc
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from clj.data import images
from clj.data.images import CropSet
from clj.data.order import uniform

SWAV = (
  CropSet("image", 32, 2, (0.14, 1.0)),
  CropSet("crops", 16, 6, (0.05, 0.14)),
)


def photograph(height, width, seed=0):
  noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
  return cv2.normalize(
    cv2.GaussianBlur(noise, (0, 0), 2), None, 0, 255, cv2.NORM_MINMAX
  )


def encode(picture, kind="PNG", **options):
  file = io.BytesIO()
  image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
  image.save(file, kind, **options)
  return file.getvalue()


def psnr(a, b):
  return 10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2))


def drawn_alone(height, width, chances, scale, ratio):
  """One box, written out."""
  for area, aspect in zip(chances[:10], chances[10:20]):
    area = height * width * (scale[0] + area * (scale[1] - scale[0]))
    low, high = np.log(ratio)
    aspect = np.exp(low + aspect * (high - low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    if w <= width and h <= height:
      return (
        int(chances[20] * (height - h + 1)),
        int(chances[21] * (width - w + 1)),
        h,
        w,
      )
  return None


# Boxes.


def test_draws_of_the_first_set_are_fixed():
  chances = uniform(3, 41, np.arange(2)[:, None], np.arange(22))
  np.testing.assert_array_equal(images.crop_chances(3, 41, 2), chances)
  fitting = 0
  for position in range(300):
    found = images.boxes((37, 53), SWAV, 3, position)["image"]
    chances = images.crop_chances(3, position, 2)
    for row, box in zip(chances, found):
      expected = drawn_alone(37, 53, row, (0.14, 1.0), (3 / 4, 4 / 3))
      if expected:
        fitting += 1
        np.testing.assert_array_equal(box, expected)
  assert fitting > 500
  # These must never change: curves of earlier runs hang on them.
  np.testing.assert_array_equal(
    images.boxes((375, 500), [CropSet("image", 224, 2)], 0, 7)["image"],
    [[7, 33, 284, 366], [51, 73, 303, 236]],
  )


def test_crops_are_those_of_crop_randomly():
  picture = photograph(60, 80)
  made = images.crops(picture, SWAV, 5, 9)
  assert {k: (v.shape, v.dtype.name) for k, v in made.items()} == {
    "image": ((2, 32, 32, 3), "uint8"),
    "crops": ((6, 16, 16, 3), "uint8"),
  }
  for view, chances in enumerate(images.crop_chances(5, 9, 2)):
    alone = images.crop_randomly(picture, 32, chances, (0.14, 1.0), (3 / 4, 4 / 3))
    np.testing.assert_array_equal(made["image"][view], alone)
  encoded = images.crops(encode(picture), SWAV, 5, 9)
  for key in made:
    np.testing.assert_array_equal(made[key], encoded[key])


def test_small_crops_come_from_the_whole_picture():
  """Their areas are those asked for, and they lie anywhere, not in the large crops."""
  height, width = 300, 400
  sides, places, inside = [], [], 0
  for position in range(400):
    found = images.boxes((height, width), SWAV, 0, position)
    top, left, h, w = found["crops"].T
    sides.append(h * w / (height * width))
    places.append(((top + h / 2) / height, (left + w / 2) / width))
    big = found["image"][0]
    inside += np.sum(
      (top >= big[0])
      & (left >= big[1])
      & (top + h <= big[0] + big[2])
      & (left + w <= big[1] + big[3])
    )
  sides = np.concatenate(sides)
  assert 0.049 < sides.min() < 0.053 and 0.137 < sides.max() < 0.141
  np.testing.assert_allclose(sides.mean(), 0.095, atol=0.002)
  places = np.concatenate(places, 1)
  np.testing.assert_allclose(places.mean(1), 0.5, atol=0.015)
  assert places.min() < 0.15 and places.max() > 0.85
  assert inside < 0.6 * sides.size
  # Every view and set is drawn by itself.
  assert np.abs(np.corrcoef(sides.reshape(400, 6).T) - np.eye(6)).max() < 0.2


def test_other_sets_draw_by_their_names():
  extra = CropSet("more", 8, 3, (0.3, 0.5))
  alone = images.boxes((90, 120), SWAV, 1, 2)
  between = images.boxes((90, 120), (SWAV[0], extra, SWAV[1]), 1, 2)
  for key in alone:
    np.testing.assert_array_equal(alone[key], between[key])
  twin = SWAV[0]._replace(key="twin")
  both = images.boxes((90, 120), (SWAV[0], twin), 1, 2)
  assert (both["image"] != both["twin"]).any()
  other = [images.boxes((90, 120), SWAV, *at)["crops"] for at in ((1, 3), (2, 2))]
  assert all((x != alone["crops"]).any() for x in other)


def test_boxes_of_another_set():
  gram = CropSet("gram", 64, 2, boxes_of="image")
  sets = (gram, *SWAV)
  found = images.boxes((90, 120), sets, 1, 2)
  np.testing.assert_array_equal(found["gram"], found["image"])
  np.testing.assert_array_equal(
    found["image"], images.boxes((90, 120), SWAV, 1, 2)["image"]
  )
  picture = cv2.GaussianBlur(photograph(90, 120), (0, 0), 3)
  made = images.crops(picture, sets, 1, 2)
  assert made["gram"].shape == (2, 64, 64, 3)
  for large, small in zip(made["gram"], made["image"]):
    halved = cv2.resize(large, (32, 32), interpolation=cv2.INTER_AREA)
    assert psnr(halved, small) > 35


@pytest.mark.parametrize(
  "gram",
  [
    CropSet("gram", 64, 2, boxes_of="imgae"),
    CropSet("gram", 64, 3, boxes_of="image"),
    CropSet("gram", 64, 2, boxes_of="gram"),
  ],
)
def test_boxes_of_no_set_are_refused(gram):
  with pytest.raises(ValueError, match=r"'gram'.*boxes_of=.*image \(2 views\)"):
    images.boxes((90, 120), (*SWAV, gram), 0, 0)


# The filter.


@pytest.mark.parametrize("side", [17, 20, 26, 31, 40, 47, 60, 128])
def test_shrunken_crops_are_close_to_antialiased_ones(side):
  whole = (0, 0, side, side)
  picture = photograph(side, side)
  found = images._resize(picture, whole, 16)
  pillow = np.asarray(Image.fromarray(picture).resize((16, 16), Image.BICUBIC))
  assert psnr(found, pillow) > 28
  np.testing.assert_allclose(found.mean(), picture.mean(), atol=2)
  stripes = np.zeros((side, side, 3), np.uint8)
  stripes[:, ::2] = 255
  aliased = cv2.resize(stripes, (16, 16), interpolation=cv2.INTER_CUBIC)
  left = images._resize(stripes, whole, 16)[4:12, 4:12].std()
  assert left < 0.75 * aliased.std() + 2 or side < 24


def test_an_axis_that_shrinks_alone_does_not_alias():
  stripes = np.zeros((4, 400, 3), np.uint8)
  stripes[:, ::2] = 255
  found = images._resize(stripes, (0, 0, 4, 400), 16)
  np.testing.assert_allclose(found, 127.5, atol=6)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("side, part", [(640, 2), (1280, 4)])
def test_a_large_jpeg_is_decoded_in_part(monkeypatch, orientation, side, part):
  exif = Image.Exif()
  exif[0x0112] = orientation
  data = encode(photograph(side, side * 3 // 2 + 1, 1), "JPEG", exif=exif)
  sets = (CropSet("a", 96, 2, (0.6, 1.0)), CropSet("b", 64, 1, (0.6, 1.0)))
  full = images.crops(images.decode(data), sets, 0, 0)
  flags = []
  real = images._opencv
  monkeypatch.setattr(images, "_opencv", lambda d, f: flags.append(f) or real(d, f))
  found = images.crops(data, sets, 0, 0)
  assert flags == [{2: cv2.IMREAD_REDUCED_COLOR_2, 4: cv2.IMREAD_REDUCED_COLOR_4}[part]]
  for key in found:
    assert psnr(found[key], full[key]) > 27
  # One set that needs the pixels is enough.
  flags.clear()
  images.crops(data, (*sets, CropSet("c", 320, 1)), 0, 0)
  assert flags == [cv2.IMREAD_COLOR_RGB]


def test_a_large_truncated_jpeg_is_refused():
  data = encode(photograph(640, 640), "JPEG")
  with pytest.raises(ValueError, match="truncated"):
    images.crops(data[:-100], (CropSet("a", 64, 1, (0.6, 1.0)),), 0, 0)


# Pictures for evaluation.


def resized_whole(picture, size, crop):
  height, width, _ = picture.shape
  target, shorter = round(size / crop), min(height, width)
  height, width = (int(target * side / shorter) for side in (height, width))
  whole = Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC)
  top, left = round((height - size) / 2), round((width - size) / 2)
  return np.asarray(whole)[top : top + size, left : left + size]


def test_central_crops_are_cut_from_the_whole():
  rng = np.random.default_rng(0)
  for i in range(400):
    short, long = int(rng.integers(1, 40)), int(rng.integers(1, 500))
    shape = (short, long) if i % 2 else (long, short)
    picture = rng.integers(0, 256, (*shape, 3), np.uint8)
    size, crop = int(rng.integers(1, 40)), float(rng.choice([1.0, 0.875, 0.7]))
    if (size, size) == shape:
      continue
    found = images.crop_centrally(picture, size, crop)
    np.testing.assert_array_equal(found, resized_whole(picture, size, crop))


@pytest.mark.parametrize("shape", [(6000, 1), (1, 6000), (3, 50_000), (50_000, 3)])
def test_extreme_pictures_stay_small(shape):
  picture = np.full((*shape, 3), 7, np.uint8)
  tracemalloc.start()  # NumPy's arrays count, Pillow's do not: hence the time, too.
  found = images.crop_centrally(picture, 224)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert found.shape == (224, 224, 3) and (found == 7).all()
  assert peak < 8e6
  assert (images.crops(picture, SWAV, 0, 0)["image"] == 7).all()


def test_fit_of_every_size():
  """Rounding put the box outside of the picture: 277 x 300 to 375 x 500, for one."""
  for height in range(250, 300):
    assert images.fit(np.zeros((height, 300, 3), np.uint8), 375, 500).shape[0] == 375


# Decoding.


def bomb(width, height):
  """A PNG of a few kilobytes that would decode to `width * height` pixels."""

  def chunk(name, data):
    checksum = struct.pack(">I", zlib.crc32(name + data))
    return struct.pack(">I", len(data)) + name + data + checksum

  head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
  rows = zlib.compress(bytes((width // 8 + 2) * height), 9)
  start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
  return start + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


BOMBS = {
  "png": bomb(7100, 7100),
  "larger png": bomb(12_000, 12_000),
  "exif png": bomb(7100, 7100)[:-12] + b"\0\0\0\0eXIf" + bomb(1, 1)[-12:],
  "jpeg": encode(Image.new("L", (7100, 7100)), "JPEG"),
  "tiff": encode(Image.new("1", (7100, 7100)), "TIFF", compression="group4"),
  "gif": encode(Image.new("P", (7100, 7100)), "GIF"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_too_many_pixels_are_refused(monkeypatch, name):
  opened = []
  real = cv2.imdecode
  monkeypatch.setattr(cv2, "imdecode", lambda *a: opened.append(a) or real(*a))
  assert len(BOMBS[name]) < 2e6
  for read in (images.decode, lambda data: images.crops(data, SWAV, 0, 0)):
    with pytest.raises(ValueError, match=r"^refused: \d+ x \d+ pixels, over 50 meg"):
      read(BOMBS[name])
  assert not opened
  assert images.decode(bomb(800, 600)).shape == (600, 800, 3)
  assert opened


def test_jpegs_with_odd_headers():
  picture = photograph(37, 53)
  data = encode(picture, "JPEG")
  expected = images.decode(data)
  assert images._jpeg_header(data)[0] == (37, 53)
  comment = b"\xff\xff\xff\xfe" + struct.pack(">H", 40) + b"\xff\xc0" * 19
  filled = data[:2] + comment + data[2:]
  assert images._jpeg_header(filled)[0] == (37, 53)
  np.testing.assert_array_equal(images.decode(filled), expected)
  stray = data[:2] + b"\0\0\0" + data[2:]
  assert images._jpeg_header(stray)[0] is None
  for length in range(2, 700, 3):
    images._jpeg_header(data[:length])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_stands_upright(orientation):
  exif = Image.Exif()
  exif[0x0112] = orientation
  try:
    data = encode(photograph(37, 53), "AVIF", exif=exif)
  except (KeyError, OSError):
    pytest.skip("Pillow without AVIF")
  expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
  assert expected.height == (37 if orientation < 5 else 53)
  np.testing.assert_array_equal(images.decode(data), np.asarray(expected))


def test_integers_of_32_bits():
  values = photograph(8, 9)[..., 0].astype(np.int32)
  fitting = encode(Image.fromarray(values * 257), "TIFF")
  expected = np.repeat(values[..., None], 3, 2)
  np.testing.assert_array_equal(images.decode(fitting), expected)
  for scale in (70_000, -1):
    with pytest.raises(ValueError, match="^pixels are integers from -?\\d+ to"):
      images.decode(encode(Image.fromarray(values * scale), "TIFF"))
  colour = cv2.imencode(".tiff", photograph(8, 9).astype(np.int32))[1].tobytes()
  with pytest.raises(ValueError, match="cannot identify"):
    images.decode(colour)


def test_chances_cover_what_a_box_needs():
  sets = [CropSet("image", 8, 3, (0.5, 0.5), (1.0, 1.0))]
  (box,) = {tuple(b[2:]) for b in images.boxes((100, 100), sets, 0, 0)["image"]}
  assert box == (round(math.sqrt(5000)),) * 2
