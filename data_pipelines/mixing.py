"""Mixing sources by weight: `A*0.7,B*0.3`.

A weight is a source's share of the utterances of an epoch, which has as many
utterances as all sources together; weights need not sum to 1. So 70 of 100
utterances come from A, whatever the two sizes are. Each source is gone
through in shuffled rounds of its own, without end: a small source comes
several times an epoch, of a large one an epoch takes a part and the next
epoch goes on from there, and no utterance comes a second time before all
others of its source have come once.

Without weights (`A,B`) the sources are joined: every utterance once per epoch.
"""

from collections.abc import Mapping
import dataclasses
import pathlib
import re

import numpy as np

from data_pipelines import sources

_WEIGHTED = re.compile(r'(.+?)\s*\*\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)')


class MixtureError(ValueError):
  """Weights that make no sense; the message says which."""


@dataclasses.dataclass(frozen=True, eq=False)
class Mixture:
  """A source, and how much of its parts an epoch takes.

  Attributes:
    source: all utterances.
    names: the parts as they were given; one if nothing is mixed.
    parts: int (utterances,), the number of each utterance's part.
    shares: of the utterances of an epoch, one a part; empty if nothing is
      mixed.
  """

  source: sources.Source
  names: tuple[str, ...]
  parts: np.ndarray
  shares: tuple[float, ...] = ()


def open_mixture(
  spec: str | Mapping[str, float],
  *,
  split: str = 'train',
  sample_rate: int = 16000,
) -> Mixture:
  """Opens sources, with or without weights.

  Args:
    spec: what `sources.open_source` takes, or the same with `*WEIGHT` behind
      every part; or a mapping from parts to weights.
    split: taken of a folder that names none.
    sample_rate: Hz of the samples that the source gives.

  Raises:
    MixtureError: for a weight that is not positive, or that only some have.
    ValueError: what `sources.open_source` raises.
  """
  weights = _parse(spec) if isinstance(spec, str) else dict(spec)
  if isinstance(spec, str) and not weights:
    source = sources.open_source(spec, split=split, sample_rate=sample_rate)
    return Mixture(source, (spec,), np.zeros(len(source), np.int32))
  _check(weights, spec)
  opened = [
    sources.open_source(name, split=split, sample_rate=sample_rate)
    for name in weights
  ]
  sizes = [len(source) for source in opened]
  total = sum(weights.values())
  return Mixture(
    source=opened[0] if len(opened) == 1 else sources.JoinedSource(opened),
    names=tuple(weights),
    parts=np.repeat(np.arange(len(sizes), dtype=np.int32), sizes),
    shares=tuple(weight / total for weight in weights.values()),
  )


def _parse(spec: str) -> dict[str, float]:
  """The weights of a text; none if it gives none."""
  weights: dict[str, float] = {}
  names = [name.strip() for name in spec.split(',') if name.strip()]
  for name in names:
    match = _WEIGHTED.fullmatch(name)
    # The whole name comes first: a path may have a star in it.
    if match is None or pathlib.Path(name).exists():
      continue
    path, weight = match.groups()
    if path in weights:
      raise MixtureError(f'{path} stands twice in {spec!r}')
    try:
      weights[path] = float(weight)
    except ValueError:
      raise MixtureError(f'{name}: {weight!r} is not a number') from None
  if weights and len(weights) < len(names):
    raise MixtureError(
      f'{spec!r}: some parts have a weight and some have none; give all of '
      'them one (A*0.7,B*0.3), or none'
    )
  return weights


def _check(weights: Mapping[str, float], spec: object) -> None:
  if not weights:
    raise MixtureError('no source is named')
  for name, weight in weights.items():
    if not 0 < weight < float('inf'):
      raise MixtureError(
        f'the weight of {name} in {spec!r} is {weight}; it must be positive'
      )
