"""Manifests into the aligner, times into files."""

from collections.abc import Iterator
from collections.abc import Sequence
import json
import os
import pathlib
from typing import Any

import tqdm

from data_pipelines import sources
from experiments.wiring import transcripts
from u2moe_jax.decoding import aligner
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.frontend import audio
from u2moe_jax.text import captions

FORMATS = ('jsonl', 'ctm')


def align(
  recognizer: recognizer_lib.Recognizer, source: sources.Source
) -> list[aligner.Aligned]:
  """Aligns every utterance with its transcript, in the source's order.

  What cannot be aligned, for its sound or its text, has a `problem`.
  """
  # Only to group like lengths: an unknown duration costs padding, no more.
  seconds = [each.duration or 0.0 for each in source.utterances]
  # Groups come by length; this puts them back into the source's order.
  results: dict[int, aligner.Aligned] = {}
  with tqdm.tqdm(
    total=len(source), unit='utt', disable=None, leave=False
  ) as progress:
    for group in recognizer.plan(seconds):
      results.update(_align_group(recognizer, source, group))
      progress.update(len(group))
  return [results[index] for index in range(len(source))]


def _align_group(
  recognizer: recognizer_lib.Recognizer,
  source: sources.Source,
  group: Sequence[int],
) -> Iterator[tuple[int, aligner.Aligned]]:
  kept, features, labels = [], [], []
  for index in group:
    text = source.utterances[index].txt
    ids, problem = aligner.encode_text(recognizer, text)
    if problem is None:
      try:
        samples = source.load(index)
      except audio.AudioError as error:
        problem = f'{error.reason}: {error}'
    if problem is not None:
      yield index, aligner.failed(problem)
      continue
    kept.append(index)
    features.append(recognizer.features(samples))
    labels.append(ids)
  # `batch.indices` count in the three lists; `kept` leads to the source.
  for batch in recognizer.batches(features):
    found = aligner.align(recognizer, batch, [labels[i] for i in batch.indices])
    yield from zip([kept[i] for i in batch.indices], found, strict=True)


def write(
  out: str | os.PathLike[str],
  source: sources.Source,
  aligned: Sequence[aligner.Aligned],
  *,
  format_name: str = 'jsonl',
) -> None:
  """Writes the times, whole or not at all; `format_name` of `FORMATS`."""
  out = pathlib.Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  unfinished = out.with_name(out.name + '.unfinished')
  with unfinished.open('w', encoding='utf-8') as file:
    for index, each in enumerate(aligned):
      key = source.utterances[index].key
      if format_name == 'jsonl':
        record = _to_record(key, source.utterances[index].txt, each)
        file.write(json.dumps(record, ensure_ascii=False) + '\n')
      elif each.problem is not None:
        file.write(f';; {key}: {each.problem}\n')  # a comment in CTM
      else:
        file.writelines(f'{line}\n' for line in captions.ctm(key, each.words))
  os.replace(unfinished, out)


def _to_record(key: str, text: str, each: aligner.Aligned) -> dict[str, Any]:
  if each.problem is not None:
    return {'key': key, 'text': text, 'problem': each.problem}
  return {
    'key': key,
    'text': text,
    'score': round(each.score, 4),
    'words': [transcripts.to_word(word) for word in each.words],
    'tokens': [
      {
        'token': token.text,
        'start': round(token.start, 3),
        'end': round(token.end, 3),
        'confidence': round(token.confidence, 5),
      }
      for token in each.tokens
    ],
  }
