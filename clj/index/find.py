"""The nearest neighbours in an index, exactly, and how they look.

Every embedding is compared, by cosine, block by block, so that memory does not grow
with the index. Texts and pictures that are looked for go through the model that made
the index, and no other.
"""

import json
import os
import sys
import textwrap
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from clj.cli import UserError
from clj.data import DataError, Want, images, open_source
from clj.data.columns import picture as decoded
from clj.data.source import KEY, first_line
from clj.evals.load import Loaded, load
from clj.evals.rows import is_picture
from clj.index.build import fingerprint
from clj.index.store import Index, open_index
from clj.losses import l2_normalize
from clj.runs import log

TILE, LINES, FONT = 160, 3, 12  # pixels; lines of a title, its height in pixels
SHOWN = 50  # neighbours in the grid, at most


class Hit(NamedTuple):
  """A neighbour: its cosine, and its row of the index, see `clj.index.store`."""

  score: float
  row: dict


def search(
  index: Index, queries: np.ndarray, k: int, among: str | None = None
) -> list[list[Hit]]:
  """The k nearest of each query, nearest first; all there are where these are fewer.

  queries: float32 `[Q, dim]`, of length 1. among: the embeddings to look at, "image":
  those of records, "text": those of their texts; None: of records, if there are any.
  Raises ValueError: no such embeddings, or a part that cannot be read.
  """
  spans = _spans(index, among)
  best = np.zeros((len(queries), 0), np.float32)
  where = np.zeros((len(queries), 0), np.int64)  # number of the span's row, see `first`
  first = np.cumsum([0, *(stop - start for _, start, stop in spans)])
  for offset, (part, start, stop) in zip(first, spans):
    for block in index.blocks(part, start, stop):
      scores = queries @ block.T
      near = np.argpartition(scores, -min(k, len(block)), axis=1)[:, -k:]
      scores = np.concatenate([best, np.take_along_axis(scores, near, 1)], axis=1)
      near = np.concatenate([where, near + offset], axis=1)
      order = np.lexsort((near, -scores))[:, :k]
      best = np.take_along_axis(scores, order, 1)
      where = np.take_along_axis(near, order, 1)
      offset += len(block)
  found = {}
  span = np.searchsorted(first, where, side="right") - 1
  for s in np.unique(span):
    part, start, _ = spans[s]
    numbers = np.unique(where[span == s])
    rows = index.rows(part, (numbers - first[s] + start).tolist())
    found |= dict(zip(numbers.tolist(), rows))
  return [
    [Hit(float(score), found[i]) for score, i in zip(scores, numbers)]
    for scores, numbers in zip(best, where.tolist())
  ]


def _spans(index, among):
  """(part, first row, end) of all rows to look at, of the parts that are there."""
  parts = index.there()
  if known := index.info.get("rows_of_parts"):
    images, texts = known["images"], known["texts"]
  else:
    notes = {part: index.notes(part) for part in parts}
    images, texts = (
      {p: n[key] for p, n in notes.items()} for key in ("images", "texts")
    )
  if among is None:
    among = "image" if any(images[p] for p in parts) else "text"
  if among == "image":
    spans = [(p, 0, images[p]) for p in parts]
  else:
    spans = [(p, images[p], images[p] + texts[p]) for p in parts]
  if not (spans := [span for span in spans if span[1] < span[2]]):
    raise UserError(
      f"{index.directory} has no embedding of {among} in the {len(parts)} files there"
    )
  return spans


def embed_queries(
  index: Index, model: Loaded, texts: Sequence[str], pictures: Sequence, column=""
) -> np.ndarray:
  """Texts, then pictures (as for `Loaded.preprocess`), as float32 `[Q, dim]`.

  column: that the texts stand for; "": the first one of texts.

  Raises UserError: the model takes no texts, or a picture cannot be read.
  """
  outputs, where, found = index.info["outputs"], index.info["workdir"], []
  for kind, given, prepare in (
    ("text", texts, model.tokenize),
    ("image", pictures, model.preprocess),
  ):
    if not given:
      continue
    if prepare is None:
      tower, other = {"text": ("text", "image"), "image": ("image", "text")}[kind]
      raise UserError(f"{where} has no {tower} tower: search by --{other}")
    name = _column(model, kind)
    if kind == "text" and column:
      name, prepare = column, model.inputs[column]
    z = model.embed(model.params, model.extra, prepare(given))
    z = z.get(outputs.get(name, name), z.get("features"))
    if z is None or z.shape[-1] != index.info["dim"]:
      raise UserError(f"{index.directory} has nothing that {name!r} is comparable with")
    found.append(np.asarray(l2_normalize(z.astype(jnp.float32))))
  return np.concatenate(found)


def _column(model: Loaded, kind: str) -> str:
  """The first column of texts or of pictures."""
  of_kind = {"text": lambda c: c.tokenizer is not None, "image": is_picture}[kind]
  return next(name for name, column in model.columns.items() if of_kind(column))


def open_model(index: Index, workdir: str | None = None) -> Loaded:
  """The model that made the index; workdir: where it lies now, if it has moved.

  Raises UserError or CheckpointError: it is not there, or it is another one.
  """
  info = index.info
  where = workdir or info["workdir"]
  try:
    model = load(where, info["step"])
  except UserError as error:
    if workdir is None:
      raise UserError(f"{first_line(error)}; if it has moved, say --workdir") from None
    raise
  if fingerprint(model) != info["weights"]:
    raise UserError(
      f"{index.directory} was made by other weights than those of {where}, step "
      f"{info['step']}: embed the collection again"
    )
  tokenizer = model.tokenizer and model.tokenizer.fingerprint
  if tokenizer != info["tokenizer"]:
    raise UserError(f"{index.directory} was made with another tokenizer than {where}'s")
  return model


class Pictures:
  """Reads pictures of an index again: from their files, or from the data set."""

  def __init__(self, index: Index):
    self._info, self._source, self.fault = index.info, None, None

  def __call__(self, row: dict) -> np.ndarray | None:
    """uint8 [H, W, 3]; None, and `fault` says why, where it is not to be had."""
    try:
      if row["path"]:
        return images.decode(epath.Path(row["path"]).read_bytes())
      self._source = self._source or _reopen(self._info)
      if len(self._source) != self._info["records"]:
        raise UserError(f"{self._source.name} has changed since it was embedded")
      (record,) = self._source.read([row["record"]])
      if isinstance(record, Exception):
        raise record
      if record[KEY] != row["id"]:
        raise UserError(f"{self._source.name} has changed since it was embedded")
      return decoded(record["image"])
    except (ValueError, OSError) as error:
      self.fault = self.fault or f"{row['id']}: {first_line(error)}"
      return None


def _reopen(info: dict):
  """The pictures of the data set that an index was made of."""
  own = [name for name in info["outputs"] if name in info["fields"]]
  field = info["fields"].get((own or ["image"])[0], "image")
  wants = {"image": Want(field, "image")}
  return open_source(info["source"], info["split"], info["data_dir"], wants=wants)


def caption_of(row: dict) -> str:
  return (row["captions"] or [row["label"] or ""])[0]


def draw(queries: Sequence, hits: list[list[Hit]], read) -> Image.Image:
  """A row for each query, text or picture, with its neighbours to the right.

  Of these the first 50. queries: strings, or uint8 [H, W, 3]. read: a row of the index
  -> its picture, or None.
  """
  tiles = []
  for query, near in zip(queries, hits):
    title = "" if isinstance(query, str) else "looked for"
    row = [_tile(query, title)]
    for rank, (score, found) in enumerate(near[:SHOWN], 1):
      picture = read(found)
      title = f"{rank}  {score:.3f}  {caption_of(found) or found['id']}"
      row.append(_tile("no picture" if picture is None else picture, title))
    tiles.append(np.stack(row))
  return Image.fromarray(log.grid(np.stack(tiles), border=6))


def _tile(picture, title: str) -> np.ndarray:
  """A picture (or a text in its place) and below it a title."""
  import matplotlib  # for a font with more letters than Pillow's

  font = os.path.join(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
  small, large = (ImageFont.truetype(font, size) for size in (FONT, 18))
  tile = Image.new("RGB", (TILE, TILE + LINES * (FONT + 3)), "white")
  brush = ImageDraw.Draw(tile)
  if isinstance(picture, str):
    lines = _wrap(picture, large, TILE - 8, 7)
    brush.multiline_text((4, TILE / 2), lines, "black", large, anchor="lm")
  else:
    image = Image.fromarray(picture)
    factor = TILE / max(image.size)
    size = [max(1, round(side * factor)) for side in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    tile.paste(image, ((TILE - size[0]) // 2, (TILE - size[1]) // 2))
  brush.multiline_text(
    (0, TILE + 2), _wrap(title, small, TILE, LINES), "black", small, spacing=2
  )
  return np.asarray(tile)


def _wrap(text, font, width, lines):
  """As many words a line as fit; letters are of about the same width."""
  letters = max(1, int(width / max(font.getlength(text) / max(len(text), 1), 1)))
  return "\n".join(textwrap.wrap(text, letters, max_lines=lines, placeholder=" …"))


def _of_texts(model: Loaded, column: str | None) -> str:
  """The column that --text stands for; "" where the model takes none."""
  texts = [name for name, c in model.columns.items() if c.tokenizer is not None]
  if column is not None and column not in texts:
    there = ", ".join(texts) or "none"
    raise UserError(f"--column={column}: the columns of texts are {there}")
  return column or next(iter(texts), "")


def find(arguments) -> int:
  """What `clj.search` does, by its flags; returns the exit code."""
  if not arguments.text and not arguments.image:
    raise UserError("nothing to look for: give --text or --image")
  if any(not text.strip() for text in arguments.text):
    raise UserError("--text is empty: say what to look for")
  if arguments.k < 1:
    raise UserError(f"--k={arguments.k}: it is 1 or more")
  index = open_index(arguments.index)
  there, parts = len(index.there()), index.info["parts"]
  if not there:
    raise UserError(
      f"{arguments.index} is incomplete, with none of {parts} files: start the same "
      "clj.embed again"
    )
  if there < parts:
    print(
      f"clj: {arguments.index} is incomplete: {there} of {parts} files are there, and "
      "only those are searched; the same clj.embed goes on",
      file=sys.stderr,
    )
  pictures = [_read(path) for path in arguments.image]
  model = open_model(index, arguments.workdir)
  column = _of_texts(model, arguments.column)
  queries = embed_queries(index, model, arguments.text, pictures, column)
  tokenizer = model.columns[column].tokenizer if arguments.text else None
  if tokenizer and tokenizer.encode(arguments.text)[2]:
    length = tokenizer.length
    print(f"clj: a text has more than {length} ids, and is cut", file=sys.stderr)
  hits = search(index, queries, arguments.k, arguments.among)
  names = [*arguments.text, *arguments.image]
  drawn = arguments.out and model.preprocess is not None
  if drawn:
    read = Pictures(index)
    grid = draw([*arguments.text, *pictures], hits, read)
    try:
      grid.save(arguments.out)
    except ValueError as error:  # an unknown suffix
      raise UserError(f"--out={arguments.out}: {first_line(error)}") from None
    if read.fault:
      print(f"clj: a picture is missing: {read.fault}", file=sys.stderr)
  if arguments.json:
    found = [
      {
        "query": name,
        "results": [
          {"rank": rank, "score": score, **row}
          for rank, (score, row) in enumerate(near, 1)
        ],
      }
      for name, near in zip(names, hits)
    ]
    print(json.dumps(found, indent=1, ensure_ascii=False))
    return 0
  for name, near in zip(names, hits):
    rows = [
      (rank, f"{score:.4f}", row["id"], caption_of(row))
      for rank, (score, row) in enumerate(near, 1)
    ]
    print(f"\n{name}\n" + log.table(rows, ("rank", "score", "id", "caption")))
  if drawn:
    print(f"\npictures: {arguments.out}")
  return 0


def _read(path):
  try:
    return images.decode(epath.Path(path).expanduser().read_bytes())
  except OSError as error:
    raise DataError(f"--image={path}: {error.strerror or error}") from None
  except ValueError as error:
    raise DataError(f"--image={path} is no picture ({first_line(error)})") from None
