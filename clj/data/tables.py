"""Tables: csv:, parquet:, and Hugging Face's data sets as Parquet, hf://.

A row is a record, and a column of the table a field. A field that is a file may be its
bytes, Hugging Face's {"bytes", "path"}, or its path, relative to the table's folder.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence

from clj.cli import UserError
from clj.data.files import read_file, resolve
from clj.data.source import (
  KEY,
  PATH,
  DataError,
  Source,
  Want,
  first_line,
  lacking,
  split_parts,
)

_PATH = "__table__"  # of the row's table, beside its columns


def open_table(
  name: str, split: str, wants: dict[str, Want], memory_limit: int
) -> Source:
  """A table, all of it in memory; what is content may be in the files that it names."""
  disk, found = _found(name, split)
  kind = name.partition(":")[0]
  size = sum(disk.size(p) for paths in found.values() for p in paths)
  if size > memory_limit:
    where = name if disk is _Disk else "parquet:PATH, where you downloaded it,"
    raise DataError(
      f"{name} has {size / 2**30:.1f} GiB, too much to hold; python -m clj.data.ingest"
      f" {where} OUT makes it a data set that is read at random"
    )
  tables = {word: read_table(kind, paths, wants, disk) for word, paths in found.items()}
  parts = split_parts(split, {w: t.num_rows for w, t in tables.items()}, name)
  table = _joined(
    name, [tables[word].slice(start, stop - start) for word, start, stop in parts]
  ).combine_chunks()
  if not table.num_rows:
    raise DataError(f"{name} {split} is empty")
  wants = {c: want for c, want in wants.items() if want.field in table.column_names}
  first = next(iter(found.values()))[0]
  return Source(
    f"{name} {split}",
    table.num_rows,
    tuple(wants),
    rows(table, wants, disk),
    class_names=_class_names(first, wants, disk) if kind != "csv" else {},
  )


class _Disk:
  """The files of this machine, by the few calls of fsspec that are needed here."""

  size = staticmethod(os.path.getsize)
  open = staticmethod(open)
  cat_file = staticmethod(read_file)


def _found(name, split):
  """Where the files are, and split -> paths, sorted."""
  if not name.startswith("hf://"):
    return _Disk, resolve(name, split)
  import fsspec

  try:
    disk = fsspec.filesystem("hf")
  except ImportError:
    raise DataError(f"{name} is read by: pip install huggingface_hub") from None
  return disk, resolve(name, split, disk.glob)


def read_table(kind: str, paths: Sequence[str], wants: dict[str, Want], disk=_Disk):
  """The wanted columns of tables, and which table a row is of; of pyarrow.

  All of a CSV file is text.
  """
  import pyarrow
  from pyarrow import csv, parquet

  tables = []
  for path in paths:
    try:
      with disk.open(path, "rb") as file:
        if kind == "csv":
          table = _read_csv(csv, path, file)
          table = table.select(columns_of(path, table.schema, wants))
        else:
          parts = parquet.ParquetFile(file)
          table = parts.read(columns=columns_of(path, parts.schema_arrow, wants))
    except pyarrow.ArrowException as error:
      raise DataError(f"{path} is no table ({first_line(error)})") from None
    tables.append(_of(path, table))
  return _joined(paths[-1], tables)


def _joined(name, tables):
  """Tables one below the other; a column may be missing in some, or be wider."""
  import pyarrow

  try:
    return pyarrow.concat_tables(tables, promote_options="permissive")
  except pyarrow.ArrowException as error:
    raise DataError(
      f"{name} has columns of another type than the tables before"
      f" ({first_line(error)}): write them alike"
    ) from None


def _of(path, table):
  """The table, and beside each row the path that it is from."""
  import pyarrow

  where = pyarrow.repeat(pyarrow.scalar(path), table.num_rows)
  return table.append_column(_PATH, where)


def _read_csv(csv, path, file):
  """A CSV file as text; its first line says whether tabs or commas are between."""
  import pyarrow

  line = file.readline()
  file.seek(0)
  options = csv.ParseOptions(delimiter=_delimiter(line), newlines_in_values=True)
  names = csv.open_csv(file, parse_options=options).schema.names
  if len(set(names)) < len(names):
    twice = next(name for name in names if names.count(name) > 1)
    raise DataError(f"{path} has two columns {twice!r}: rename one of them")
  file.seek(0)
  return csv.read_csv(
    file,
    parse_options=options,
    convert_options=csv.ConvertOptions(
      column_types={name: pyarrow.string() for name in names}
    ),
  )


def _delimiter(line):
  return "\t" if line.count(b"\t") > line.count(b",") else ","


def columns_of(path: str, schema, wants: dict[str, Want]) -> list[str]:
  """The columns of a table that are wanted, each once.

  Raises:
    DataError: one that must be there is not, or is there twice.
  """
  names = {want.field for want in lacking(path, wants, schema.names, "column").values()}
  for name in names:
    if schema.names.count(name) > 1:
      raise DataError(f"{path} has two columns {name!r}: rename one of them")
  return [name for name in schema.names if name in names]


def rows(table, wants: dict[str, Want], disk=_Disk):
  """`Source.reader` of a table that `read_table` gave.

  A record is called by its first file, if it has one, else by its number.
  """

  import pyarrow

  named = {  # whose value is short, and names the record
    column
    for column, want in wants.items()
    if want.content and pyarrow.types.is_string(table.schema.field(want.field).type)
  }

  def read(indices, columns):
    records = []
    for i in map(int, indices):
      try:
        record = {}
        for column, want in wants.items():
          if column not in columns and column not in named:
            continue
          value, path = table[want.field][i].as_py(), None
          if want.content:
            value, path = _content(value, table[_PATH][i].as_py())
          if path is not None:
            record = {KEY: value, PATH: path} | record
            value = disk.cat_file(path) if column in columns else None
          if column in columns:
            record[column] = value
        records.append({KEY: str(i)} | record)
      except (OSError, ValueError) as error:
        records.append(error)
    return records

  return read


def _content(value, table):
  """What a value stands for: bytes or numbers, or a file's name, and its path."""
  if isinstance(value, dict):  # as Hugging Face's data sets have it
    value = value.get("bytes") or value.get("path")
  if not isinstance(value, str) or not value:
    return value, None
  if re.match(r"https?://", value):
    raise UserError(f"{value} is not a file; img2dataset downloads such tables")
  return value, os.path.join(os.path.dirname(table), value)


def _class_names(path, wants, disk):
  """Names of classes as Hugging Face's `datasets` writes them into Parquet files."""
  from pyarrow import parquet

  with disk.open(path, "rb") as file:
    metadata = parquet.read_schema(file).metadata or {}
  try:
    described = json.loads(metadata.get(b"huggingface", b"{}"))
    features = described.get("info", {}).get("features", {})
    names = {c: features.get(want.field, {}).get("names") for c, want in wants.items()}
  except (ValueError, AttributeError):
    return {}
  return {c: tuple(map(str, found)) for c, found in names.items() if found}


def column_names(kind: str, path: str) -> list[str]:
  """The columns of a table."""
  from pyarrow import csv, parquet

  if kind == "parquet":
    return parquet.read_schema(path).names
  with open(path, "rb") as file:
    options = csv.ParseOptions(
      delimiter=_delimiter(file.readline()), newlines_in_values=True
    )
  with csv.open_csv(path, parse_options=options) as reader:
    return reader.schema.names


def read_groups(path: str, groups: Sequence[int], wants: dict[str, Want]) -> Iterator:
  """The wanted columns of row groups of a Parquet file, one table after the other."""
  from pyarrow import parquet

  with parquet.ParquetFile(path) as file:
    names = columns_of(path, file.schema_arrow, wants)
    for group in groups:
      yield _of(path, file.read_row_group(group, columns=names))


def row_groups(path: str, least: int) -> Iterator[tuple[list[int], int]]:
  """Row groups of a Parquet file that have `least` rows together, and their first."""
  from pyarrow import parquet

  metadata = parquet.read_metadata(path)
  groups, start, rows = [], 0, 0
  for group in range(metadata.num_row_groups):
    groups.append(group)
    rows += metadata.row_group(group).num_rows
    if rows >= least or group == metadata.num_row_groups - 1:
      yield groups, start
      groups, start, rows = [], start + rows, 0
