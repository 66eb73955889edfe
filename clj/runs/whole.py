"""Files that are whole where they are, whatever is killed meanwhile."""

import os
import platform
from collections.abc import Callable


def write(path: str, content: bytes | Callable):
  """Writes a local file beside, puts it on the disk and renames it.

  Several processes may do so at the same time. content: or a function that writes it,
  given the file that is open.
  """
  folder, name = os.path.split(path)
  own = f"{platform.node()}-{os.getpid()}"
  partial = os.path.join(folder, f".{name}.{own}.partial")
  with open(partial, "wb") as file:
    file.write(content) if isinstance(content, bytes) else content(file)
    file.flush()
    os.fsync(file.fileno())
  os.replace(partial, path)
