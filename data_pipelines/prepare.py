"""From a corpus to a folder that training can use.

The folder holds a TFDS data set (`tfds_dataset`), and of its train split the
CMVN statistics and the character table:

  OUT/dataset_info.json, features.json, speech-SPLIT.*   audio and transcripts
  OUT/index-SPLIT.jsonl                                  all but the audio
  OUT/global_cmvn.json                                   CMVN statistics
  OUT/tokens/                                            character table
  OUT/skipped.jsonl                                      what was unusable, why
  OUT/source.json                                        what it was made from
"""

from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np
import tqdm

from data_pipelines import manifest
from data_pipelines import tfds_dataset
from data_pipelines.corpora import espeak
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import audio
from u2moe_jax.frontend import cmvn
from u2moe_jax.frontend import fbank
from u2moe_jax.text import tokenizer

CMVN_FILE = 'global_cmvn.json'
TOKENS_FOLDER = 'tokens'
SKIPPED_FILE = 'skipped.jsonl'
SOURCE_FILE = 'source.json'
_TRAIN = 'train'

_Pairs = Iterable[tuple[str, tfds_dataset.Recording]]


class PrepareError(ValueError):
  """A corpus that cannot be prepared; the message says what to do."""


def prepare_builtin(
  out: str | os.PathLike[str],
  *,
  seed: int = 0,
  num_train: int = 4000,
  num_dev: int = 300,
  num_test: int = 300,
  num_workers: int | None = None,
  force: bool = False,
) -> None:
  """Speaks the built-in corpus into a folder, unless it is there already.

  Args:
    out: the folder; appears when it is complete.
    seed: where chance comes from.
    num_train: utterances to train on.
    num_dev: utterances to choose checkpoints by.
    num_test: utterances to report on.
    num_workers: processes; None for one a core, 0 for none but this one.
    force: make it anew even if it is there.

  Raises:
    PrepareError: if `out` holds something else.
    EngineError: if the speech engine is not installed.
  """
  sizes = {'num_train': num_train, 'num_dev': num_dev, 'num_test': num_test}
  for name, size in sizes.items():
    if size < 1:
      raise PrepareError(f'{name} is {size}; it must be positive')
  source = {'source': 'builtin', 'seed': seed, **sizes}
  if _is_done(out, source, force):
    return
  print(f'speaking {sum(sizes.values())} utterances, seed {seed}')
  pairs = espeak.build(seed=seed, num_workers=num_workers, **sizes)
  _write(out, pairs, total=sum(sizes.values()), source=source, skipped=[])


def prepare_manifest(
  out: str | os.PathLike[str],
  *,
  train: str | os.PathLike[str],
  dev: str | os.PathLike[str] | None = None,
  test: str | os.PathLike[str] | None = None,
  sample_rate: int = 16000,
  force: bool = False,
) -> None:
  """Packs the audio of manifests into a folder, unless it is there already.

  Unusable audio is left out, said on the way and listed in `skipped.jsonl`.

  Args:
    out: the folder; appears when it is complete.
    train: manifest to train on.
    dev: manifest to choose checkpoints by.
    test: manifest to report on.
    sample_rate: in Hz; everything is resampled to it.
    force: make it anew even if it is there.

  Raises:
    PrepareError: if `out` holds something else, or no audio is usable.
    ManifestError: if a manifest cannot be used.
  """
  paths = {'train': train, 'dev': dev, 'test': test}
  given = {s: os.path.abspath(p) for s, p in paths.items() if p}
  source = {'source': 'manifest', **given}
  if _is_done(out, source, force):
    return
  utterances = {split: manifest.read(path) for split, path in given.items()}
  total = sum(map(len, utterances.values()))
  print(f'reading {total} utterances of {", ".join(given.values())}')
  skipped: list[dict[str, str]] = []
  pairs = _load_all(utterances, sample_rate, skipped)
  _write(out, pairs, total=total, source=source, skipped=skipped)


def _is_done(
  out: str | os.PathLike[str], source: Mapping[str, Any], force: bool
) -> bool:
  """Says whether `out` is complete; refuses to write over anything else."""
  out = pathlib.Path(out)
  if not out.exists():
    return False
  if not tfds_dataset.is_dataset(out):
    if out.is_dir() and not any(out.iterdir()):
      return False
    raise PrepareError(f'{out}: holds something else; give another --out')
  if force:
    return False
  path = out / SOURCE_FILE
  made_from = json.loads(path.read_text('utf-8')) if path.is_file() else None
  if made_from != source:
    raise PrepareError(
      f'{out}: was prepared from {made_from}, not {dict(source)}; give another '
      '--out, or --force to replace it'
    )
  print(f'{out}: already prepared, nothing to do')
  return True


def _load_all(
  utterances: Mapping[str, list[manifest.Utterance]],
  sample_rate: int,
  skipped: list[dict[str, str]],
) -> Iterator[tuple[str, tfds_dataset.Recording]]:
  for split, items in utterances.items():
    for item in items:
      try:
        samples = audio.load_audio(item.wav, sample_rate=sample_rate)
      except audio.AudioError as error:
        skipped.append(
          {'key': item.key, 'reason': error.reason, 'detail': str(error)}
        )
        tqdm.tqdm.write(f'left out {item.key}: {error}', file=sys.stderr)
        continue
      extra = {k: v for k, v in item.extra.items() if k != 'duration'}
      yield (
        split,
        tfds_dataset.Recording(
          item.key, item.txt, to_int16(samples), sample_rate, extra
        ),
      )


def to_int16(samples: np.ndarray) -> np.ndarray:
  """Rounds floats within [-1, 1] to int16; what is beyond is clipped."""
  limits = np.iinfo(np.int16)
  # The inverse of reading, which divides by 32768: 16-bit files stay as they
  # are.
  scaled = np.round(samples * (limits.max + 1.0))
  return np.clip(scaled, limits.min, limits.max).astype(np.int16)


def _write(
  out: str | os.PathLike[str],
  pairs: _Pairs,
  *,
  total: int,
  source: Mapping[str, Any],
  skipped: list[dict[str, str]],
) -> None:
  summary = _Summary()

  def finish(folder: pathlib.Path) -> None:
    summary.save(folder)
    lines = (json.dumps(item, ensure_ascii=False) + '\n' for item in skipped)
    (folder / SKIPPED_FILE).write_text(''.join(lines), encoding='utf-8')
    (folder / SOURCE_FILE).write_text(json.dumps(source), encoding='utf-8')

  # On a terminal a bar that moves; in a log a line now and then.
  bar = tqdm.tqdm(
    pairs,
    total=total,
    unit='utt',
    mininterval=0.5 if sys.stderr.isatty() else 10.0,
    ascii=not sys.stderr.isatty(),
  )
  try:
    tfds_dataset.write(out, summary.watch(bar), finish=finish)
  except tfds_dataset.DatasetError as error:
    raise PrepareError(f'{out}: {error}') from None
  summary.report(out, num_skipped=len(skipped))


class _Summary:
  """Gathers, while recordings go by, what is to be known of the corpus."""

  def __init__(self) -> None:
    self._features = config_lib.FeatureConfig()
    self._cmvn = cmvn.empty(self._features.num_mel_bins)
    self._characters: set[str] = set()
    self._seconds: dict[str, list[float]] = {}

  def watch(self, pairs: _Pairs) -> _Pairs:
    """Passes the pairs on."""
    for split, recording in pairs:
      self._seconds.setdefault(split, []).append(recording.duration)
      if split == _TRAIN:
        self._characters.update(' '.join(recording.txt.split()))
        self._add_features(recording)
      yield split, recording

  def _add_features(self, recording: tfds_dataset.Recording) -> None:
    samples = audio.as_mono(
      recording.audio,
      recording.sample_rate,
      sample_rate=self._features.sample_rate,
      name=recording.key,
    )
    frames = fbank.fbank(samples, self._features)
    self._cmvn = cmvn.accumulate(self._cmvn, frames)

  def save(self, folder: pathlib.Path) -> None:
    """Writes CMVN statistics and character table."""
    if self._cmvn.count == 0:
      raise PrepareError(
        f'the split {_TRAIN!r} has no usable audio; CMVN statistics and the '
        'character table come from it'
      )
    cmvn.save(folder / CMVN_FILE, self._cmvn)
    # One text with all the characters; the space counts only inside a text.
    between = ' ' if ' ' in self._characters else ''
    text = between.join(sorted(self._characters - {' '}))
    tokenizer.build_char_tokenizer([text]).save(folder / TOKENS_FOLDER)

  def report(self, out: str | os.PathLike[str], *, num_skipped: int) -> None:
    """Prints the size of each split."""
    for split, seconds in self._seconds.items():
      print(
        f'{split}: {len(seconds)} utterances, {sum(seconds) / 3600:.2f} hours, '
        f'{np.mean(seconds):.2f} s on average'
      )
    if num_skipped:
      print(f'left out {num_skipped} utterances, see {SKIPPED_FILE}')
    print(f'prepared {os.fspath(out)}')
