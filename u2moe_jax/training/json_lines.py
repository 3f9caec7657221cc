"""Files of JSON lines that grow, in runs that may be killed at any moment."""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import json
import os
import pathlib
from typing import Any


def append(
  path: str | os.PathLike[str], records: Iterable[Mapping[str, Any]]
) -> None:
  """Adds records, whole lines at a time."""
  lines = [json.dumps(each, ensure_ascii=False) + '\n' for each in records]
  # In one write: whoever is killed here leaves at most one torn line, the last.
  with pathlib.Path(path).open('a', encoding='utf-8') as file:
    file.write(''.join(lines))


def forget_torn_line(path: str | os.PathLike[str]) -> None:
  """Cuts off an end without a newline, which a killed run may leave."""
  path = pathlib.Path(path)
  if not path.is_file():
    return
  with path.open('rb+') as file:
    text = file.read()
    whole = text.rfind(b'\n') + 1
    if whole < len(text):
      file.truncate(whole)


def read(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
  """Yields the records; lines that are none are passed over."""
  path = pathlib.Path(path)
  if not path.is_file():
    return
  # Bytes, because a torn line need not be UTF-8; that too is a ValueError.
  with path.open('rb') as file:
    for line in file:
      try:
        record = json.loads(line)
      except ValueError:
        continue
      if isinstance(record, dict):
        yield record
