"""What a config makes of its data: shapes, padding, and single utterances."""

import collections
from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses

from jaxtyping import Float
import numpy as np

from data_pipelines import pipeline
from data_pipelines import plan
from experiments.wiring import corpora
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import fbank
from u2moe_jax.text import tokenizer as tokenizer_lib


@dataclasses.dataclass
class Usage:
  """What one compiled shape is used for, in counts.

  Attributes:
    bucket: the shape.
    batches: batches of it.
    rows: their rows.
    utterances: rows that are not empty.
    frames: frames of the utterances, without padding.
    tokens: tokens of the utterances, without padding.
  """

  bucket: plan.Bucket
  batches: int = 0
  rows: int = 0
  utterances: int = 0
  frames: int = 0
  tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Inspection:
  """A corpus as training sees it.

  Attributes:
    corpus: the utterances.
    tokenizer: text to ids.
    batches: the training batches.
    config: the experiment.
  """

  corpus: pipeline.Corpus
  tokenizer: tokenizer_lib.Tokenizer
  batches: pipeline.TrainBatches
  config: config_lib.Config


@dataclasses.dataclass(frozen=True)
class Example:
  """One utterance, before and after augmentation.

  Attributes:
    key: its name.
    text: its transcript.
    tokens: its token ids, as text.
    samples: mono waveform.
    frames: plain features (T, F).
    augmented: features as a training batch holds them (T', F).
    speed: speed factor of that batch.
    batch: number of that batch.
  """

  key: str
  text: str
  tokens: tuple[str, ...]
  samples: Float[np.ndarray, 'samples']
  frames: Float[np.ndarray, 'T F']
  augmented: Float[np.ndarray, 't F']
  speed: float
  batch: int


def open_data(config: config_lib.Config) -> Inspection:
  """Opens the training data of a config, as training does.

  Raises:
    ConfigError: if the config names no training data.
    ValueError: if the data cannot be used; says why.
  """
  if not config.data.train:
    raise config_lib.ConfigError(
      'data.train is empty; give --config.data.train='
    )
  mixture = corpora.open_data(config, config.data.train)
  tokenizer = corpora.first_tokenizer(config.data, mixture)
  corpus = corpora.make_corpus(config, mixture, tokenizer)
  # The seed of training, so these are its batches; on a mesh their sizes would
  # be multiples of its parts.
  batches = pipeline.TrainBatches(corpus, seed=config.train.seed)
  return Inspection(corpus, tokenizer, batches, config)


def summary(inspection: Inspection) -> str:
  """Size of the corpus, what is left out, and how epochs are planned."""
  corpus, tokenizer = inspection.corpus, inspection.tokenizer
  together = inspection.batches.epochs_together
  parts = [
    f'{len(corpus.items)} utterances, {corpus.hours:.2f} h',
    f'{tokenizer.vocab_size} tokens ({tokenizer.kind})',
    f'{len(inspection.batches.buckets)} shapes',
    f'{together} epochs planned together' if together > 1 else '',
  ]
  lines = [' | '.join(part for part in parts if part)]
  reasons = collections.Counter(skip.reason for skip in corpus.skipped)
  if reasons:
    counts = ', '.join(f'{n} {name}' for name, n in reasons.most_common())
    lines.append(f'left out: {counts}')
  return '\n'.join(lines)


def count(inspection: Inspection, *, epochs: int) -> list[Usage]:
  """Counts what the batches of the first epochs hold, by shape."""
  batches, items = inspection.batches, inspection.corpus.items
  features = inspection.config.data.features
  usage = {bucket: Usage(bucket) for bucket in batches.buckets}
  for epoch in range(epochs):
    for planned in batches.epoch(epoch):
      one = usage[planned.bucket]
      one.batches += 1
      one.rows += planned.bucket.batch_size
      one.utterances += len(planned.indices)
      for index, speed in zip(planned.indices, planned.speeds, strict=True):
        item = items[index]
        # Speed changes the length, so it is that of this draw.
        one.frames += plan.num_frames(item.seconds, speed, features)
        one.tokens += item.num_tokens
  return list(usage.values())


_COLUMNS = (
  'frames',
  'tokens',
  'rows',
  'batches',
  'utterances',
  'padded frames %',
  'padded tokens %',
  'empty rows %',
)


def table(usage: Sequence[Usage]) -> list[dict[str, float | str]]:
  """One line a shape, and one for all; shares are of real rows' shapes."""
  lines = [_line([one]) for one in usage]
  everything = _line(usage)
  return [*lines, {**everything, 'frames': 'all', 'tokens': '', 'rows': ''}]


def _line(usage: Sequence[Usage]) -> dict[str, float | str]:
  def total(values: Iterable[int]) -> int:
    return sum(values)

  utterances = total(one.utterances for one in usage)
  # Of rows that hold an utterance; empty rows have a column of their own.
  frames = total(one.utterances * one.bucket.max_frames for one in usage)
  tokens = total(one.utterances * one.bucket.max_tokens for one in usage)
  rows = total(one.rows for one in usage)
  bucket = usage[0].bucket
  return {
    'frames': bucket.max_frames,
    'tokens': bucket.max_tokens,
    'rows': bucket.batch_size,
    'batches': total(one.batches for one in usage),
    'utterances': utterances,
    'padded frames %': _percent(
      frames - total(o.frames for o in usage), frames
    ),
    'padded tokens %': _percent(
      tokens - total(o.tokens for o in usage), tokens
    ),
    'empty rows %': _percent(rows - utterances, rows),
  }


def _percent(part: int, whole: int) -> float:
  return round(100 * part / whole, 2) if whole else 0.0


def format_table(lines: Sequence[dict[str, float | str]]) -> str:
  """The lines under their headings, in columns."""
  cells = [
    list(_COLUMNS),
    *([str(line[name]) for name in _COLUMNS] for line in lines),
  ]
  widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
  return '\n'.join(
    '  '.join(cell.rjust(width) for cell, width in zip(row, widths))
    for row in cells
  )


def examples(inspection: Inspection, number: int) -> list[Example]:
  """Utterances from short to long, with the batch that has each first."""
  corpus = inspection.corpus
  by_length = sorted(
    range(len(corpus.items)), key=lambda i: corpus.items[i].seconds
  )
  # Without both ends, where the odd ones are.
  places = np.linspace(0, len(by_length) - 1, number + 2)[1:-1]
  chosen = dict.fromkeys(by_length[int(place)] for place in places)
  return [_example(inspection, index) for index in chosen]


def _example(inspection: Inspection, index: int) -> Example:
  corpus, config = inspection.corpus, inspection.config
  number, row, speed = _find(inspection, index)
  # The whole batch is made, just as training makes it.
  arrays = inspection.batches[number].arrays
  length = int(arrays['feature_lengths'][row])
  text = corpus.text(index)
  tokenizer = inspection.tokenizer
  samples = corpus.samples(index)
  return Example(
    key=corpus.items[index].key,
    text=text,
    tokens=tuple(tokenizer.tokens[i] for i in tokenizer.encode(text)),
    samples=samples,
    # No generator, so no dither: the sound as it is.
    frames=fbank.fbank(samples, config.data.features),
    augmented=arrays['features'][row, :length],  # [t, F]
    speed=speed,
    batch=number,
  )


def _find(inspection: Inspection, index: int) -> tuple[int, int, float]:
  """The first batch with an utterance: its number, the row, the speed."""
  number = 0
  # It ends: every utterance comes sooner or later.
  while True:
    _, planned = inspection.batches.locate(number)
    if index in planned.indices:
      row = planned.indices.index(index)
      return number, row, planned.speeds[row]
    number += 1
