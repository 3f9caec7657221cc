"""From a config to an opened corpus: source, token table, CMVN statistics."""

from collections.abc import Iterable
import dataclasses
import pathlib

from data_pipelines import mixing
from data_pipelines import pipeline
from data_pipelines import sources
from data_pipelines import statistics
from u2moe_jax import config as config_lib
from u2moe_jax.frontend import cmvn as cmvn_lib
from u2moe_jax.layers import subsampling
from u2moe_jax.text import tokenizer as tokenizer_lib


def open_data(
  config: config_lib.Config, spec: str, *, split: str = 'train'
) -> mixing.Mixture:
  """Opens what `data.train` or `data.dev` names, at the features' rate."""
  rate = config.data.features.sample_rate
  return mixing.open_mixture(spec, split=split, sample_rate=rate)


def make_corpus(
  config: config_lib.Config,
  mixture: mixing.Mixture,
  tokenizer: tokenizer_lib.Tokenizer,
) -> pipeline.Corpus:
  """Tokenises a source and leaves out what the encoder cannot use."""
  geometry = subsampling.geometry(config.model.encoder.subsampling)
  return pipeline.Corpus(
    mixture.source,
    tokenizer,
    config.data,
    rate=geometry.rate,
    # Fewer frames give no output of the subsampling, and so nothing to train.
    min_input=geometry.window(1),
    mixture=mixture,
  )


def first_tokenizer(
  data: config_lib.DataConfig, mixture: mixing.Mixture
) -> tokenizer_lib.Tokenizer:
  """The configured table, the corpus's own, or one from the transcripts.

  Raises:
    ValueError: if the table cannot be read, or not be made.
  """
  if data.tokens:
    return tokenizer_lib.load(data.tokens)
  if data.token_type == 'bytes':
    return tokenizer_lib.ByteTokenizer()
  # Lazily: a prepared folder brings its table, and nobody reads them then.
  texts = (utterance.txt for utterance in mixture.source.utterances)
  if data.token_type == 'bpe':
    return _train_bpe(texts, data.num_tokens)
  beside = _beside(mixture, 'tokens')
  # That table is of single characters.
  if beside is not None and not data.double_letters:
    return tokenizer_lib.load(beside)
  return tokenizer_lib.build_char_tokenizer(
    texts, double_letters=data.double_letters
  )


def _train_bpe(
  texts: Iterable[str], num_tokens: int
) -> tokenizer_lib.Tokenizer:
  try:
    return tokenizer_lib.train_bpe(texts, num_tokens, model_type='bpe')
  except ValueError as error:
    raise config_lib.ConfigError(
      f'data.token_type=bpe with data.num_tokens={num_tokens}: {error}'
    ) from error


def first_cmvn(
  data: config_lib.DataConfig, mixture: mixing.Mixture
) -> cmvn_lib.CmvnStats:
  """The configured statistics, the corpus's own, or computed ones.

  Raises:
    ValueError: if a file is no statistics, or of another number of bins.
  """
  bins = data.features.num_mel_bins
  if data.cmvn:
    stats = cmvn_lib.load(data.cmvn)
    if len(stats.sum) != bins:
      raise config_lib.ConfigError(
        f'{data.cmvn} has {len(stats.sum)} bins, '
        f'data.features.num_mel_bins asks for {bins}'
      )
    return stats
  beside = _beside(mixture, 'global_cmvn.json')
  # Preparing takes the default features, and statistics of others are
  # worthless.
  if beside is not None and _are_default(data.features):
    return cmvn_lib.load(beside)
  print(f'computing CMVN of {bins} mel bins', flush=True)
  return statistics.compute_cmvn(
    mixture.source, data.features, num_workers=data.num_workers
  )


def _are_default(features: config_lib.FeatureConfig) -> bool:
  """Says whether features are those of a prepared folder's statistics."""
  default = config_lib.FeatureConfig()
  # Dither is no part of the statistics.
  return dataclasses.replace(features, dither=default.dither) == default


def _beside(mixture: mixing.Mixture, name: str) -> pathlib.Path | None:
  """A file that preparing left with the train split, if that is the source."""
  # Of several sources each has its own, and none is that of all.
  if len(mixture.names) > 1:
    return None
  (spec, *more) = sources.parse(mixture.names[0])
  if more or spec.kind != 'prepared' or spec.split not in (None, 'train'):
    return None
  path = pathlib.Path(spec.path) / name
  return path if path.exists() else None
