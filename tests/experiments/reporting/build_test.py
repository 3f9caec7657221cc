"""The whole report, with a tiny model."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines import synthetic
from experiments.reporting import build
from experiments.reporting import utterance
from experiments.wiring import reporting
from u2moe_jax import config as config_lib
from u2moe_jax.checkpoint import directory
from u2moe_jax.decoding import recognizer as recognizer_lib
from u2moe_jax.frontend import fbank
from u2moe_jax.text import tokenizer as tokenizer_lib

_LAYERS, _EXPERTS = 2, 3
_TOKENIZER = tokenizer_lib.build_char_tokenizer(['ABC DEF'])


@pytest.fixture(scope='module')
def recognizer():
  moe = config_lib.MoeConfig(num_experts=_EXPERTS, top_k=2)
  model = config_lib.ModelConfig(
    vocab_size=_TOKENIZER.vocab_size,
    feature_dim=20,
    encoder=config_lib.EncoderConfig(
      num_blocks=_LAYERS,
      model_dim=16,
      num_heads=2,
      ffn_dim=16,
      conv_kernel=3,
      moe=moe,
    ),
    decoder=config_lib.DecoderConfig(
      num_blocks=1, num_reverse_blocks=1, num_heads=2, ffn_dim=16, moe=moe
    ),
  )
  variables = directory.abstract_variables(model)
  features = config_lib.FeatureConfig(num_mel_bins=20)
  # Without CMVN the frames are all alike, and so is whatever comes of them.
  frames = fbank.fbank(_noise(1.0), features)
  cmvn = {'mean': frames.mean(axis=0), 'istd': 1 / frames.std(axis=0)}
  return recognizer_lib.Recognizer(
    directory.Description(model, features),
    jax.tree.map(_random, variables['params']),
    {'cmvn': cmvn},
    tokenizer=_TOKENIZER,
    config=config_lib.DecodeConfig(mode='ctc_greedy_search', chunk_size=4),
  )


def _random(leaf):
  """Weights without compiling an initialiser."""
  generator = np.random.default_rng(leaf.size)
  return jnp.asarray(generator.normal(size=leaf.shape), leaf.dtype)


def _noise(seconds):
  samples = np.random.default_rng(0).normal(size=int(16000 * seconds))
  return 0.1 * samples.astype(np.float32)


def _workdir(path):
  load = np.full((_LAYERS, _EXPERTS), 1 / _EXPERTS).tolist()
  line = {
    'step': 1,
    'kind': 'train',
    'loss': 2.0,
    'learning_rate': 0.1,
    'load/encoder.final': load,
  }
  (path / 'metrics.jsonl').write_text(json.dumps(line) + '\n{"step": 2, "k')
  return path


def test_inspection_is_the_pass_the_decode_config_asks_for(recognizer):
  samples = _noise(1.2)
  seen = utterance.inspect(recognizer, samples)

  @jax.jit
  def log_probs(features, chunk_size):
    """Without padding, and without the recogniser."""
    lengths = jnp.array([features.shape[1]])
    model, variables = recognizer.model, {'params': recognizer.params}
    encoded = model.apply(
      variables,
      features,
      lengths,
      recognizer.buffers,
      chunk_size=chunk_size,
      method='encode',
    )
    return model.apply(variables, encoded.frames, method='ctc_log_probs')[0]

  features = recognizer.features(samples)[None]
  np.testing.assert_allclose(
    seen.log_probs, log_probs(features, 4), rtol=0, atol=1e-4
  )
  full_context = log_probs(features, -1)
  assert np.abs(seen.log_probs - full_context).max() > 1e-2
  # The subsampling alone lies between frames and seconds.
  assert len(seen.log_probs) * seen.frame_seconds == pytest.approx(1.2, abs=0.1)


def test_every_real_frame_has_an_expert(recognizer):
  seen = utterance.inspect(recognizer, _noise(1.2))
  assert list(seen.expert_index) == ['encoder.macaron', 'encoder.final']
  for index in seen.expert_index.values():
    assert index.shape == (_LAYERS, len(seen.log_probs))
    # Padding reads as expert E; none of it may be left.
    assert 0 <= index.min() <= index.max() < _EXPERTS


def test_text_is_the_greedy_search(recognizer):
  samples = _noise(1.2)
  found = recognizer.transcribe(samples, sample_rate=16000)
  assert utterance.inspect(recognizer, samples).text == found.text
  assert found.text


def test_a_work_directory_gives_plots_and_a_page(recognizer, tmp_path):
  results = [{'mode': 'attention', 'context': 'full', 'wer': 1.5}]
  path = build.build(
    _workdir(tmp_path),
    recognizer=recognizer,
    example=('utterance <7>', _noise(1.2), 'ABC'),
    results=results,
    facts={'Corpus': 'noise'},
  )
  plots = {plot.stem for plot in (tmp_path / 'plots').iterdir()}
  assert plots == {
    'losses',
    'optimizer',
    'expert_load',
    'expert_load_over_training',
    'ctc_posteriors',
    'experts_per_frame',
  }
  page = path.read_text(encoding='utf-8')
  assert page.count('<img') == len(plots)
  for text in ('utterance &lt;7&gt;', '1.50', 'Corpus', 'Unreadable lines'):
    assert text in page


def test_the_report_of_any_training(recognizer, tmp_path):
  workdir = _workdir(tmp_path)
  with pytest.raises(ValueError, match='--workdir is the one of training'):
    reporting.report(tmp_path / 'nowhere', None)
  # Before the first checkpoint there are curves, and no model to ask.
  reporting.report(workdir, None)
  assert not (workdir / 'plots' / 'experts_per_frame.png').exists()
  _TOKENIZER.save(tmp_path / 'tokens')
  directory.write(
    workdir / 'model',
    recognizer.description,
    recognizer.params,
    recognizer.buffers,
    tokens=tmp_path / 'tokens',
  )
  manifest = synthetic.write_corpus(
    tmp_path / 'tones', num_utterances=3, seed=1
  )
  page = reporting.report(workdir, str(manifest)).read_text(encoding='utf-8')
  assert (workdir / 'plots' / 'experts_per_frame.png').is_file()
  assert 'tones-1-' in page
  assert '2 Conformer blocks' in page


def test_without_metrics_there_are_no_curves(tmp_path):
  stale = tmp_path / 'plots' / 'losses.png'
  stale.parent.mkdir()
  path = build.build(tmp_path, recognizer=None, example=None, results=[])
  page = path.read_text(encoding='utf-8')
  assert '<img' not in page
  assert 'no metrics.jsonl' in page
