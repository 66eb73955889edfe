"""An index: embeddings with their ids, in files that many programs read.

    DIRECTORY/index.json                   what it holds, and of which model
    DIRECTORY/part-00000-of-00012.parquet  format "parquet": a row an embedding
    DIRECTORY/part-00000-of-00012.npy      format "npy": float32 [rows, dim], and beside
    DIRECTORY/part-00000-of-00012.json     it the other columns, a list each

A part has the embeddings of so many records of a data set: first those of pictures (or
of what else the model embeds), then those of captions. The columns are

    embedding  float32 [dim], of length 1
    id         of the record: a path below the folder, "SHARD.tar:KEY", a TFDS id, a row
    path       of the picture's file, where it is one
    record     its number in the data set
    modality   the column that was embedded: "image", "text" or another
    captions   those of a picture, or the one that was embedded
    label      name of its class, where there are classes

A file is written beside, put on the disk and renamed: where it is, it is whole.
"""

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence

import numpy as np

from clj.cli import UserError
from clj.runs import whole

FORMATS = ("parquet", "npy")
COLUMNS = ("id", "path", "record", "modality", "captions", "label")
BLOCK = 16384  # rows that are read at a time, and of a row group of Parquet


@dataclasses.dataclass(frozen=True)
class Index:
  """info: what index.json has; "parts" and "format" among it."""

  directory: str
  info: dict

  def file(self, part: int) -> str:
    """Its embeddings."""
    return f"{self._stem(part)}.{self.info['format']}"

  def _stem(self, part):
    name = f"part-{part:05d}-of-{self.info['parts']:05d}"
    return os.path.join(self.directory, name)

  def there(self) -> list[int]:
    """The parts that are written."""
    names = set(os.listdir(self.directory))
    parts = range(self.info["parts"])
    return [p for p in parts if os.path.basename(self.file(p)) in names]

  def write_info(self, **more) -> "Index":
    """Writes index.json; returns the index with `more` in it."""
    index = dataclasses.replace(self, info=self.info | more)
    text = json.dumps(index.info, indent=1) + "\n"
    whole.write(os.path.join(self.directory, "index.json"), text.encode())
    return index

  def write(self, part: int, embedding: np.ndarray, columns: dict, notes: dict):
    """Writes a part.

    embedding: float32 [rows, dim]. columns: a list of `rows` values for each name of
    COLUMNS. notes: JSON-able, of the part: "images" and "texts" are its rows of each.
    """
    if self.info["format"] == "npy":
      text = json.dumps(columns | {"notes": notes}, ensure_ascii=False)
      whole.write(f"{self._stem(part)}.json", text.encode())
      whole.write(self.file(part), lambda file: np.save(file, embedding))
      return
    import pyarrow as pa
    from pyarrow import parquet

    _, dim = embedding.shape
    # No numbers are missing: what says so of each would double the time of reading.
    vector = pa.list_(pa.field("element", pa.float32(), nullable=False), dim)
    types = {
      "id": pa.string(),
      "path": pa.string(),
      "record": pa.int64(),
      "modality": pa.string(),
      "captions": pa.list_(pa.string()),
      "label": pa.string(),
    }
    flat = pa.array(embedding.reshape(-1), pa.float32())
    arrays = [pa.FixedSizeListArray.from_arrays(flat, type=vector)]
    arrays += [pa.array(columns[name], type) for name, type in types.items()]
    fields = [pa.field("embedding", vector, nullable=False), *types.items()]
    schema = pa.schema(fields, metadata={"clj": json.dumps(notes)})
    table = pa.table(arrays, schema=schema)
    options = {"row_group_size": BLOCK, "compression": "none"}
    options |= {"use_dictionary": ["modality", "label"]}
    whole.write(
      self.file(part), lambda file: parquet.write_table(table, file, **options)
    )

  def notes(self, part: int) -> dict:
    """What `write` was given of a part."""
    if self.info["format"] == "npy":
      return self._columns(part)["notes"]
    from pyarrow import parquet

    return json.loads(parquet.read_schema(self.file(part)).metadata[b"clj"])

  def blocks(self, part: int, first: int, stop: int) -> Iterator[np.ndarray]:
    """The embeddings of rows `first` to `stop` of a part, float32 [<= BLOCK, dim].

    Raises:
      ValueError: the file is broken.
    """
    path, dim, rows = self.file(part), self.info["dim"], 0
    read = self._npy_blocks if self.info["format"] == "npy" else self._parquet_blocks
    try:
      for start, block in read(path, first, stop):
        block = block[max(first - start, 0) : stop - start]
        if block.shape[1:] != (dim,) or block.dtype != np.float32:
          raise UserError(f"{block.dtype} {block.shape}, not float32 [rows, {dim}]")
        rows += len(block)
        yield block
    except (ValueError, OSError) as error:  # pyarrow's errors are ValueErrors
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      raise UserError(f"{path} cannot be read ({reason}); {_MEND}") from None
    if rows != stop - first:
      raise UserError(f"{path} lacks {stop - first - rows} rows; {_MEND}")

  def _npy_blocks(self, path, first, stop):
    for start in range(first, stop, BLOCK):
      # Mapped anew, so that pages of the last block do not stay.
      yield start, np.load(path, mmap_mode="r")[start : min(start + BLOCK, stop)]

  def _parquet_blocks(self, path, first, stop):
    from pyarrow import parquet

    start = 0
    with parquet.ParquetFile(path) as file:
      for batch in file.iter_batches(BLOCK, columns=["embedding"]):
        if start + len(batch) > first and start < stop:
          values = batch.column(0).flatten().to_numpy(zero_copy_only=False)
          yield start, values.reshape(len(batch), -1)
        start += len(batch)

  def rows(self, part: int, rows: Sequence[int]) -> list[dict]:
    """All columns but the embedding of some rows of a part."""
    if self.info["format"] == "npy":
      columns = self._columns(part)
      return [{name: columns[name][r] for name in COLUMNS} for r in rows]
    from pyarrow import parquet

    table = parquet.read_table(self.file(part), columns=list(COLUMNS))
    return table.take(list(rows)).to_pylist()

  def _columns(self, part):
    with open(f"{self._stem(part)}.json", encoding="utf-8") as file:
      return json.load(file)


_MEND = "remove it, and start the same clj.embed again"


def open_index(directory: str) -> Index:
  """Raises ValueError, one line, where there is no index."""
  path = os.path.join(directory, "index.json")
  try:
    with open(path, encoding="utf-8") as file:
      info = json.load(file)
    if info.get("format") not in FORMATS:
      raise UserError(f"its format is {info.get('format')!r}")
  except FileNotFoundError:
    raise UserError(
      f"there is no index in {directory!r} (no index.json): make one by clj.embed"
    ) from None
  except (ValueError, AttributeError) as error:
    raise UserError(f"{path} is not of an index ({error})") from None
  return Index(directory, info)
