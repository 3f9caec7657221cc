"""Flags that make a DecodeConfig, shared by decode and stream."""

from typing import TYPE_CHECKING

from absl import flags
from absl import logging

from u2moe_jax import config as config_lib

if TYPE_CHECKING:
  # For the annotation alone: importing it would make --help wait for JAX.
  from u2moe_jax.checkpoint import directory

_DEFAULT = config_lib.DecodeConfig()


def define(*, mode: str = _DEFAULT.mode, chunk_size: int = -1) -> None:
  """Defines the flags; call once, at the top of a script."""
  flags.DEFINE_enum('mode', mode, config_lib.DECODING_MODES, 'How to search.')
  flags.DEFINE_integer(
    'chunk_size', chunk_size, 'Encoder frames per chunk; -1: full context.'
  )
  flags.DEFINE_integer('left_chunks', -1, 'Chunks of left context; -1: all.')
  flags.DEFINE_integer('beam', _DEFAULT.beam, 'Hypotheses kept.')
  flags.DEFINE_integer('nbest', _DEFAULT.nbest, 'Hypotheses returned.')
  flags.DEFINE_float(
    'ctc_weight', _DEFAULT.ctc_weight, 'CTC share in rescoring.'
  )
  flags.DEFINE_float(
    'reverse_weight',
    _DEFAULT.reverse_weight,
    'Right-to-left share in rescoring.',
  )
  flags.DEFINE_float(
    'length_penalty',
    _DEFAULT.length_penalty,
    'Attention search divides by length to this power.',
  )
  flags.DEFINE_float(
    'blank_penalty', _DEFAULT.blank_penalty, 'Subtracted from the blank logit.'
  )
  flags.DEFINE_float(
    'batch_seconds', _DEFAULT.batch_seconds, 'Padded sound per batch.'
  )
  flags.DEFINE_string(
    'hotwords',
    _DEFAULT.hotwords,
    'File of phrases to listen for, one a line (optional: tab, score).',
  )
  flags.DEFINE_float(
    'hotword_score', _DEFAULT.hotword_score, 'Bonus per token of a hotword.'
  )
  flags.DEFINE_float(
    'whole_seconds',
    _DEFAULT.whole_seconds,
    'Longer recordings are cut into segments before they are decoded.',
  )
  _define_endpoint()


def _define_endpoint() -> None:
  """Flags of the rules that cut streams and long recordings."""
  rules = _DEFAULT.endpoint
  flags.DEFINE_float(
    'silence_after_speech',
    rules.silence_after_speech,
    'Seconds of silence that end a segment with words in it; 0: never.',
  )
  flags.DEFINE_float(
    'long_silence',
    rules.long_silence,
    'Seconds of silence that end a segment, words or none; 0: never.',
  )
  flags.DEFINE_float(
    'max_segment_seconds', rules.max_seconds, 'Longest segment.'
  )
  flags.DEFINE_float(
    'blank_threshold',
    rules.blank_threshold,
    'Blank probability from which on a frame is silent.',
  )


def config() -> config_lib.DecodeConfig:
  """The config that the parsed flags ask for.

  Raises:
    config_lib.ConfigError: for a value that is out of range; names it.
  """
  values = flags.FLAGS
  return config_lib.DecodeConfig(
    mode=values.mode,
    chunk_size=values.chunk_size,
    left_chunks=values.left_chunks,
    beam=values.beam,
    nbest=values.nbest,
    ctc_weight=values.ctc_weight,
    reverse_weight=values.reverse_weight,
    length_penalty=values.length_penalty,
    blank_penalty=values.blank_penalty,
    batch_seconds=values.batch_seconds,
    hotwords=values.hotwords,
    hotword_score=values.hotword_score,
    whole_seconds=values.whole_seconds,
    endpoint=config_lib.EndpointConfig(
      silence_after_speech=values.silence_after_speech,
      long_silence=values.long_silence,
      max_seconds=values.max_segment_seconds,
      blank_threshold=values.blank_threshold,
    ),
  )


def warn(
  description: 'directory.Description', config: config_lib.DecodeConfig
) -> None:
  """Says what the model was never trained for: settings, rounded weights."""
  from u2moe_jax.decoding import recognizer

  for line in recognizer.cautions(config, description.model):
    logging.warning('%s; expect more errors', line)
  weights = description.provenance.get('weights', 'float32')
  if description.form == 'inference' and weights != 'float32':
    logging.warning(
      'this model has its weights in %s; its answers may differ from those of '
      'the one it was made from',
      weights,
    )
