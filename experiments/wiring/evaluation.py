"""All modes and contexts of a trained model on one test set."""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from data_pipelines import sources
from experiments.wiring import decoding
from u2moe_jax import config as config_lib
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.text import scoring

CONTEXTS = {'full': -1, 'chunk16': 16, 'chunk8': 8}
# What the cached path decodes too, to be compared with the masked pass.
_STREAMED: tuple[config_lib.DecodingMode, str] = (
  'attention_rescoring',
  'chunk16',
)
# Hypotheses of the attention search, at most. Its cost goes with them, and more
# do not help: the decoders alone prefer short texts, which wide beams find.
_ATTENTION_BEAM = 5
# dB; a band holds its lower edge.
# The last one ends above 30, so that 30 dB itself lies in it.
_SNR_BANDS = ((5.0, 10.0), (10.0, 20.0), (20.0, 30.1))
# Below this, rounding may decide which expert or hypothesis is taken.
NEAR_TIE = 1e-5


def evaluate(
  recognizer: recognizer_lib.Recognizer,
  source: sources.Source,
  workdir: pathlib.Path,
  *,
  say: Callable[[str], None] = print,
) -> list[dict[str, Any]]:
  """Decodes in every mode and context, and through the streaming path.

  What stands in WORKDIR/results.json already is not done again.

  Args:
    recognizer: the model.
    source: the test set.
    workdir: results.json and transcripts/ go here.
    say: told what is being done.

  Returns:
    One entry per line of the table.
  """
  file = workdir / 'results.json'
  results: list[dict[str, Any]] = []
  if file.is_file():
    results = json.loads(file.read_text(encoding='utf-8'))
  done = {(r['mode'], r['context'], r['streaming']) for r in results}
  for mode, context, streamed in _plan():
    if (mode, context, streamed) in done:
      continue
    say(f'decoding: {mode}, {context}{", streaming" if streamed else ""}')
    config = dataclasses.replace(
      recognizer.config, mode=mode, chunk_size=CONTEXTS[context]
    )
    if mode == 'attention':
      beam = min(config.beam, _ATTENTION_BEAM)
      config = dataclasses.replace(config, beam=beam)
    entry = _evaluate_one(
      recognizer.with_config(config), source, workdir, context, streamed
    )
    results.append(entry)
    # After each line: a run that is stopped loses one at most.
    _write_json(file, results)
  return results


def _plan() -> list[tuple[config_lib.DecodingMode, str, bool]]:
  plan = [
    (mode, context, False)
    for context in CONTEXTS
    for mode in config_lib.DECODING_MODES
  ]
  return [*plan, (*_STREAMED, True)]


def _evaluate_one(
  recognizer: recognizer_lib.Recognizer,
  source: sources.Source,
  workdir: pathlib.Path,
  context: str,
  streamed: bool,
):
  name = f'{recognizer.config.mode}-{context}'
  folder = workdir / 'transcripts'
  out = folder / f'{name}{"-streaming" if streamed else ""}.jsonl'
  summary, decoded = decoding.run(
    recognizer, source, streamed=streamed, out=out
  )
  entry = {
    'mode': recognizer.config.mode,
    'context': context,
    'streaming': streamed,
    **summary.to_json(),
    'chunk_ms_p50': _percentile(summary.chunk_ms, 50),
    'chunk_ms_p95': _percentile(summary.chunk_ms, 95),
    'wer_by_snr': wer_by_snr(decoded),
  }
  if streamed:
    # `_plan` has the masked passes first, so this file is there.
    masked = folder / f'{name}.jsonl'
    entry['differs_from_masked'] = differences(decoded, masked)
  return entry


def _percentile(values: Sequence[float], share: int) -> float | None:
  return round(float(np.percentile(values, share)), 2) if values else None


def wer_by_snr(decoded: Sequence[decoding.Decoded]) -> dict[str, float]:
  """WER per band of signal-to-noise ratio; empty for a corpus without."""
  bands: dict[str, list[tuple[str, str]]] = {}
  for each in decoded:
    if 'snr' not in each.utterance.extra:
      continue
    pair = (
      scoring.normalise(each.utterance.txt),
      scoring.normalise(each.transcript.text),
    )
    bands.setdefault(_band(each.utterance.extra['snr']), []).append(pair)
  return {
    name: round(scoring.corpus_errors(bands[name]).rate, 3)
    for name in sorted(bands, key=_band_order)
  }


def _band(snr: float | None) -> str:
  for low, high in _SNR_BANDS:
    if snr is not None and low <= snr < high:
      return f'{low:.0f}-{high:.0f} dB'
  return 'clean' if snr is None else 'other'


def _band_order(name: str) -> float:
  return float(name.split('-')[0]) if name[0].isdigit() else np.inf


def differences(
  streamed: Sequence[decoding.Decoded], masked: pathlib.Path
) -> list[dict[str, Any]]:
  """Utterances whose streamed words differ from the masked pass.

  Args:
    streamed: results of the streaming path.
    masked: transcripts of the masked pass, JSON lines.

  Returns:
    Key, both texts and the smallest margin on the streamed path. One that is
    not a near tie (`NEAR_TIE`) is a defect.
  """
  lines = masked.read_text(encoding='utf-8').splitlines()
  texts = {record['key']: record['text'] for record in map(json.loads, lines)}
  return [
    {
      'key': each.utterance.key,
      'streamed': each.transcript.text,
      'masked': texts[each.utterance.key],
      'margin': each.transcript.margin,
      'near_tie': each.transcript.margin < NEAR_TIE,
    }
    for each in streamed
    if each.transcript.text != texts[each.utterance.key]
  ]


def _write_json(file: pathlib.Path, value: Any) -> None:
  temporary = file.with_name(file.name + '.tmp')
  temporary.write_text(json.dumps(value, indent=1) + '\n', encoding='utf-8')
  os.replace(temporary, file)
