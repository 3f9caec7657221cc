"""Cases on disk: what a folder of stored reference numbers holds."""

from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import functools
import json
import os
import pathlib
from typing import Any
import zipfile

import numpy as np


class CaseError(ValueError):
  """A folder that is no case, or a damaged one; names the file."""


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
  """One folder.

  Attributes:
    name: of the folder.
    folder: where it is.
    tree: everything to be compared, and inputs, by file and key.
  """

  name: str
  folder: pathlib.Path
  tree: Mapping[str, Mapping[str, Any]]

  @property
  def arrays(self) -> Mapping[str, np.ndarray]:
    """Inputs and outputs (`io.npz`)."""
    return self.tree.get('io', {})

  @property
  def results(self) -> Mapping[str, Any]:
    """Losses and search results (`results.json`)."""
    return self.tree.get('results', {})

  @property
  def settings(self) -> Mapping[str, Any]:
    """The yaml keys and special ids (`config.json`)."""
    return self.tree.get('config', {})

  @functools.cached_property
  def weights(self) -> Mapping[str, np.ndarray]:
    """State dict of the reference."""
    path = self.folder / 'weights.npz'
    if not path.exists():
      raise CaseError(f'{self.folder}: no weights.npz')
    return _arrays(path)


def discover(folder: str | os.PathLike[str]) -> list[Case]:
  """Opens a case, or every case in the folders of a folder.

  A case is a folder with `io.npz` or `results.json` (a model, a search,
  single functions) or `fbank.npz` (features).

  Raises:
    CaseError: if there is none, or a file cannot be read.
  """
  path = pathlib.Path(folder)
  if not path.is_dir():
    raise CaseError(f'{path}: no such folder')
  inside = sorted(p for p in path.iterdir() if p.is_dir() and _is_case(p))
  # A case may have folders in it; they are none then.
  folders = [path] if _is_case(path) else inside
  if not folders:
    raise CaseError(
      f'{path}: no case here; a case is a folder with io.npz, results.json or '
      'fbank.npz'
    )
  return [_load(each) for each in folders]


def _is_case(folder: pathlib.Path) -> bool:
  names = ('io.npz', 'results.json', 'fbank.npz')
  return any((folder / name).exists() for name in names)


def _load(folder: pathlib.Path) -> Case:
  # Resolved, so that `.` has a name in the table.
  return Case(folder.resolve().name, folder, dict(_files(folder)))


def _files(folder: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
  """Every file of the format that is there, but for the weights."""
  for name in ('io', 'fbank', 'cmvn_expected'):
    path = folder / f'{name}.npz'
    if path.exists():
      yield name, _arrays(path)
  for name in ('config', 'results', 'info', 'global_cmvn'):
    path = folder / f'{name}.json'
    if path.exists():
      yield name, _json(path)


def _arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    # A pickle in a stranger's file could run anything.
    with np.load(path, allow_pickle=False) as file:
      return {key: file[key] for key in file.files}
  except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise CaseError(f'{path}: not a readable npz file ({error})') from error


def _json(path: pathlib.Path) -> dict[str, Any]:
  try:
    tree = json.loads(path.read_text(encoding='utf-8'))
  except ValueError as error:
    raise CaseError(f'{path}: not JSON ({error})') from error
  if not isinstance(tree, dict):
    raise CaseError(f'{path}: must hold an object')
  return tree
