"""`shapes`: an embedded data set, drawn in memory from a seed in a second or two.

Every picture shows one shape on a mild two-colour gradient. The label is the shape
alone; colour, place, size, rotation and background vary freely, all shapes have the
same area, and the shape is as often brighter as darker than what lies behind it. Raw
pixels, colours and linear models therefore tell the shapes apart poorly, while a small
convolutional network does so almost perfectly: what a representation gains is visible
within minutes. No label changes under a flip, a rotation or another colour.

There is no texture on purpose: it would tell pictures apart without their shape.

`compositions` is the same for pictures with text: a class is a shape in a colour, and
one composition in eight is never seen in training, though its shape and its colour are.
"""

import numpy as np

SHAPES = (
  "circle",
  "ring",
  "square",
  "triangle",
  "star",
  "cross",
  "bar",
  "stripes",
  "dots",
)
# Muted: strong colours are a way to tell pictures apart that asks for no shape.
COLORS = {
  "red": (0.55, 0.29, 0.29),
  "orange": (0.74, 0.59, 0.42),
  "yellow": (0.86, 0.84, 0.59),
  "green": (0.33, 0.51, 0.35),
  "cyan": (0.46, 0.69, 0.71),
  "blue": (0.24, 0.27, 0.50),
  "purple": (0.39, 0.25, 0.44),
  "pink": (0.80, 0.64, 0.71),
}
SIZES = {"train": 4500, "test": 1800}
# One colour of every shape; every colour of some shape.
UNSEEN = tuple((3 * shape + 1) % len(COLORS) for shape in range(len(SHAPES)))
COMPOSITION_SIZES = {"train": 9000, "test": 1800, "seen": 1800}
COMPOSITIONS = tuple(f"{color} {shape}" for shape in SHAPES for color in COLORS)
_SIDE = 32
# Half the side of a square of the same area, in parts of the picture's side.
_EXTENT = (0.18, 0.28)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def shapes(split: str, *, seed: int = 0, count: int | None = None) -> dict:
  """Draws a split of the data set.

  Args:
    split: "train" or "test": streams of draws that share nothing.
    seed: another seed is another data set of the same kind.
    count: number of pictures; None: 4500 or 1800.

  Returns:
    image uint8 [N, 32, 32, 3]; label int32 [N], an index of SHAPES, each as often as
    the others; color int32 [N], an index of COLORS; caption, N strings such as "a small
    red star at the upper left"; and what was drawn: extent and center (in parts of
    the side), angle (radians), float32.

  Raises:
    KeyError: another split.
  """
  count = SIZES[split] if count is None else count
  rng = np.random.default_rng([seed, list(SIZES).index(split)])
  label = rng.permutation(count).astype(np.int32) % len(SHAPES)
  color = rng.integers(len(COLORS), size=count, dtype=np.int32)
  return _draw(rng, label, color)


def compositions(split: str, *, seed: int = 0, count: int | None = None) -> dict:
  """Draws a split of the compositions of a shape and a colour.

  Args:
    split: "train", pictures of seven compositions in eight; "test", pictures of the
      others, `UNSEEN`, alone; "seen", more pictures of those in training.
    seed: another seed is another data set of the same kind.
    count: number of pictures; None: 9000, 1800 or 1800.

  Returns:
    As `shapes`, but label is an index of COMPOSITIONS and caption a list of lists of
    strings: in "train" the same said in four ways, the others as in `shapes`.

  Raises:
    KeyError: another split.
  """
  count = COMPOSITION_SIZES[split] if count is None else count
  rng = np.random.default_rng([seed, len(SIZES), list(COMPOSITION_SIZES).index(split)])
  unseen = np.arange(len(SHAPES)) * len(COLORS) + UNSEEN
  seen = np.setdiff1d(np.arange(len(COMPOSITIONS)), unseen)
  kinds = unseen if split == "test" else seen
  label = kinds[rng.permutation(count) % len(kinds)].astype(np.int32)
  shape, color = np.divmod(label, np.int32(len(COLORS)))
  drawn = _draw(rng, shape, color)
  captions = [[caption] for caption in drawn["caption"].tolist()]
  if split == "train":
    captions = [[c, *_in_other_words(c)] for (c,) in captions]
  return drawn | {"label": label, "caption": captions}


def _in_other_words(caption):
  """ "a small red star at the upper left" -> the same in three other ways."""
  what, place = caption.split(" at the ")
  article = "a " if what.startswith("a ") else ""
  size, color, shape = what.removeprefix("a ").split()
  return (
    f"{article}{color} {shape}",
    f"a picture of {article}{color} {shape}, {size}, {place}",
    f"at the {place} {article}{size} {shape} in {color}",
  )


def _draw(rng, label, color):
  """Pictures of shapes `label` [N] in colours `color` [N]."""
  count = len(label)
  extent = rng.uniform(*_EXTENT, count).astype(np.float32)
  angle = rng.uniform(0, 2 * np.pi, count).astype(np.float32)
  # A shape reaches 1.1 to 2 extents from its centre: some leave the picture a little,
  # as things do in photographs.
  room = 0.42 - extent[:, None]
  center = (0.5 + room * rng.uniform(-1, 1, (count, 2))).astype(np.float32)
  paint = np.array(list(COLORS.values()), np.float32)[color]
  paint = np.clip(paint + rng.uniform(-0.06, 0.06, (count, 3)), 0, 1)
  back = _backgrounds(rng, paint)

  image = np.empty((count, _SIDE, _SIDE, 3), np.uint8)
  for kind in range(len(SHAPES)):
    mine = np.flatnonzero(label == kind)
    for rows in np.array_split(mine, len(mine) // 256 + 1):
      cover = _cover(kind, extent[rows], center[rows], angle[rows])[..., None]
      picture = _gradient(*(x[rows] for x in back)) * (1 - cover)
      picture += cover * paint[rows, None, None]
      image[rows] = np.clip(picture * 255 + 0.5, 0, 255)
  return {
    "image": image,
    "label": label,
    "color": color,
    "caption": _captions(label, color, extent, center),
    "extent": extent,
    "center": center,
    "angle": angle,
  }


def _backgrounds(rng, paint):
  """Two colours and a direction for each picture, never too close to its paint.

  The brightness stays apart from the paint's, or the shape would vanish in grey.
  """
  count = len(paint)
  first = _muted(rng, count)
  while len(near := np.flatnonzero(np.abs((first - paint) @ _LUMA) < 0.25)):
    first[near] = _muted(rng, len(near))
  second = np.clip(first + rng.uniform(-0.12, 0.12, (count, 3)), 0, 1)
  return first, second, rng.uniform(0, 2 * np.pi, count)


def _muted(rng, count):
  """Colours `[count, 3]` of any brightness, a little off grey."""
  grey = rng.uniform(0.05, 0.95, (count, 1))
  return np.clip(grey + rng.uniform(-0.05, 0.05, (count, 3)), 0, 1)


def _gradient(first, second, angle):
  """Colours `[n, side, side, 3]` that run from `first` to `second` along `angle`."""
  axis = (np.arange(_SIDE) + 0.5) / _SIDE - 0.5
  along = (
    np.cos(angle)[:, None, None] * axis + np.sin(angle)[:, None, None] * axis[:, None]
  )
  mixed = np.clip(along / np.sqrt(2) + 0.5, 0, 1)[..., None].astype(np.float32)
  first, second = (x[:, None, None].astype(np.float32) for x in (first, second))
  return first + mixed * (second - first)


def _cover(kind, extent, center, angle):
  """How much of each pixel the shape covers, float32 `[n, side, side]` in [0, 1].

  From the signed distance to the outline, positive outside, clipped to one pixel.
  """
  axis = (np.arange(_SIDE, dtype=np.float32) + 0.5) / _SIDE
  extent, angle = extent[:, None, None], angle[:, None, None]
  dx = axis[None, None, :] - center[:, 0, None, None]
  dy = axis[None, :, None] - center[:, 1, None, None]
  cos, sin = np.cos(angle), np.sin(angle)
  x, y = (cos * dx + sin * dy) / extent, (cos * dy - sin * dx) / extent
  distance = _OUTLINES[SHAPES[kind]](x, y) * extent * _SIDE
  return np.clip(0.5 - distance, 0, 1)


# Signed distances to outlines around the centre of gravity, each of which encloses the
# area of the square |x|, |y| < 1: the area shall not give the shape away.


def _circle(x, y):
  return np.hypot(x, y) - 1.128


def _ring(x, y):
  return np.abs(np.hypot(x, y) - 1.45) - 0.22


def _square(x, y):
  return np.maximum(np.abs(x), np.abs(y)) - 1


def _triangle(x, y):
  x, _ = _fold(x, y, 3)
  return x - 0.877


def _star(x, y):
  x, y = _fold(x, y, 5)
  # The edge from a tip, at radius 2.05, to a notch, at radius 0.664.
  tip, notch = 2.05, 0.664 * np.exp(1j * np.pi / 5)
  edge = (notch - tip) / abs(notch - tip)
  return (x - tip) * edge.imag - y * edge.real


def _cross(x, y):
  x, y = np.abs(x), np.abs(y)
  return np.maximum(np.maximum(x, y) - 1.65, np.minimum(x, y) - 0.336)


def _bar(x, y):
  return np.maximum(np.abs(x) - 1.95, np.abs(y) - 0.513)


def _stripes(x, y):
  y = y - 0.85 * np.clip(np.round(y / 0.85), -1, 1)
  return np.maximum(np.abs(x) - 1.4, np.abs(y) - 0.238)


def _dots(x, y):
  return np.hypot(np.abs(x) - 0.9, np.abs(y) - 0.9) - 0.564


def _fold(x, y, n):
  """Turns each point by a multiple of 360/n degrees next to the x axis, y >= 0."""
  radius, sector = np.hypot(x, y), 2 * np.pi / n
  angle = np.arctan2(y, x)
  angle = np.abs(angle - sector * np.round(angle / sector))
  return radius * np.cos(angle), radius * np.sin(angle)


_OUTLINES = {
  "circle": _circle,
  "ring": _ring,
  "square": _square,
  "triangle": _triangle,
  "star": _star,
  "cross": _cross,
  "bar": _bar,
  "stripes": _stripes,
  "dots": _dots,
}


def _captions(label, color, extent, center):
  low, high = _EXTENT
  sizes = np.array(["small", "medium-sized", "large"])
  size = sizes[np.clip((extent - low) / (high - low) * 3, 0, 2).astype(int)]
  rows = np.array(["upper ", "", "lower "])[np.digitize(center[:, 1], (0.45, 0.55))]
  columns = np.array(["left", "middle", "right"])[
    np.digitize(center[:, 0], (0.45, 0.55))
  ]
  names = list(COLORS)
  captions = []
  for i, kind in enumerate(label):
    article = "" if SHAPES[kind] in ("stripes", "dots") else "a "
    what = f"{article}{size[i]} {names[color[i]]} {SHAPES[kind]}"
    captions.append(f"{what} at the {rows[i]}{columns[i]}")
  return np.array(captions)
