"""Configuration: frozen dataclasses, validated when they are made.

The tree is `Config(model, data, optimizer, train, mesh, decode)`. Experiment
files build an `ml_collections.ConfigDict` so that absl flags can override
keys; `from_dict` turns it into these classes, and the library sees only them.
"""

from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import functools
import math
import pathlib
import re
import types
import typing
from typing import Any
from typing import Literal
from typing import TypeVar

_T = TypeVar('_T')

RouterType = Literal['topk_softmax', 'softmax_topk']
Executor = str  # `auto`, or a file in ops/executors
# How parameters lie: as they are trained, or as decoding reads them fastest
# (models/inference.py). No config key: a checkpoint says which form it has.
Form = Literal['training', 'inference']
Subsampling = Literal['conv2d', 'conv2d6', 'conv2d8']
Position = Literal['rel_pos', 'abs_pos', 'no_pos', 'rope_pos']
ConvNorm = Literal['layer_norm', 'batch_norm', 'rms_norm']
Activation = Literal['swish', 'relu', 'gelu']
Schedule = Literal['warmup_inverse_sqrt', 'cosine', 'constant']
WorkerType = Literal['thread', 'process']
RematPolicy = Literal['nothing', 'dots']
DecodingMode = Literal[
  'ctc_greedy_search',
  'ctc_prefix_beam_search',
  'attention',
  'attention_rescoring',
]
DECODING_MODES: tuple[DecodingMode, ...] = typing.get_args(DecodingMode)


class ConfigError(ValueError):
  """A configuration that cannot work; the message names the key."""


def _require(condition: bool, message: str) -> None:
  if not condition:
    raise ConfigError(message)


def _require_choice(owner: str, key: str, value: str, choices: Any) -> None:
  allowed = typing.get_args(choices)
  _require(
    value in allowed,
    f'{owner}.{key} is {value!r}; it must be one of {", ".join(allowed)}',
  )


def _require_rate(owner: str, **rates: float) -> None:
  for key, value in rates.items():
    _require(
      0.0 <= value < 1.0, f'{owner}.{key} is {value}; it must be in [0, 1)'
    )


def _require_share(owner: str, **shares: float) -> None:
  for key, value in shares.items():
    _require(
      0.0 <= value <= 1.0, f'{owner}.{key} is {value}; it must be in [0, 1]'
    )


def _require_range(owner: str, **ranges: tuple[float, ...]) -> None:
  for key, value in ranges.items():
    _require(
      len(value) == 2 and value[0] <= value[1],
      f'{owner}.{key} is {value}; it must be (lowest, highest)',
    )


def _require_positive(owner: str, **numbers: float) -> None:
  for key, value in numbers.items():
    _require(value > 0, f'{owner}.{key} is {value}; it must be positive')


@functools.cache
def executors() -> tuple[str, ...]:
  """What `moe.executor` may be; each file of ops/executors is one."""
  # By their names: to import them would take JAX, and pull in a higher floor.
  folder = pathlib.Path(__file__).parent / 'ops' / 'executors'
  names = sorted(file.stem for file in folder.glob('[a-z]*.py'))
  return ('auto', *names)


# Feed-forward layers by name: two in an encoder block, one in a decoder's.
_FFNS = ('macaron', 'final', 'ffn')
_BLOCKS = re.compile(
  r'all|(?P<first>\d+)(-(?P<last>\d+))?|every:(?P<period>[1-9]\d*)'
)


def _expert_places(term: str, num_blocks: int) -> set[tuple[int, str]]:
  """The (block, FFN) pairs of one term of `MoeConfig.where`."""
  blocks, dot, name = term.rpartition('.')
  if not dot:
    blocks, name = ('all', term) if term in _FFNS else (term, '')
  match = _BLOCKS.fullmatch(blocks)
  if match is None or name not in (_FFNS if dot else (*_FFNS, '')):
    raise ConfigError(
      f'moe.where: {term!r} cannot be read; it takes all, a block (0), blocks '
      '(6-11) or every:2, with or without a feed-forward layer behind '
      f'(6-11.final), or one alone ({", ".join(_FFNS)})'
    )
  chosen = range(num_blocks)
  if match['period']:
    period = int(match['period'])
    chosen = chosen[period - 1 :: period]
  elif match['first']:
    # A slice: blocks beyond the last one are left out without an error, since
    # one list serves two decoders that may differ in length.
    first = int(match['first'])
    chosen = chosen[first : int(match['last'] or first) + 1]
  return {(i, ffn) for i in chosen for ffn in ((name,) if name else _FFNS)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeConfig:
  """Mixture-of-Experts feed-forward layer; `num_experts=0` means dense.

  Attributes:
    num_experts: experts E per layer; 0 for one dense feed-forward layer.
    where: feed-forward layers with experts, the others are dense: a comma
      list of blocks (`all`, `0`, `6-11`, or `every:2`: the second, the fourth,
      ...), with one of their layers behind (`every:2.final`) or without, or
      of layers (`macaron`, `final`; in a decoder `ffn`).
    top_k: experts J that each frame visits.
    router_type: `topk_softmax` takes the top-k of the raw logits and a softmax
      over the kept ones (U2++ MoE); `softmax_topk` scales each kept expert by
      its probability among all experts (Switch), which top-1 needs to train.
    executor: how a routing plan is carried out (`ops/grouped_matmul.py`).
    capacity_factor: slots per expert over the even share, for `capacity`,
      in training only.
    block_size: rows per block for `blocked`.
  """

  num_experts: int = 0
  where: str = 'all'
  top_k: int = 2
  router_type: RouterType = 'topk_softmax'
  executor: Executor = 'auto'
  capacity_factor: float = 2.0
  block_size: int = 0

  def __post_init__(self):
    _require_choice('moe', 'router_type', self.router_type, RouterType)
    _require(
      self.executor in executors(),
      f'moe.executor is {self.executor!r}; it must be one of '
      f'{", ".join(executors())}',
    )
    _require_positive('moe', capacity_factor=self.capacity_factor)
    _require(self.num_experts >= 0, 'moe.num_experts must not be negative')
    self.placed(0, ())  # raises for what cannot be read
    if self.num_experts:
      _require(
        1 <= self.top_k <= self.num_experts,
        f'moe.top_k is {self.top_k}; it must be between 1 and '
        f'moe.num_experts={self.num_experts}',
      )

  def placed(
    self, num_blocks: int, ffns: Sequence[str]
  ) -> tuple[tuple[str, ...], ...]:
    """For each block of a stack, its feed-forward layers with experts.

    Args:
      num_blocks: blocks of the stack.
      ffns: what each block has, in the order of the pass.

    Raises:
      ConfigError: if `where` cannot be read.
    """
    chosen = {
      place
      for term in self.where.split(',')
      for place in _expert_places(term.strip(), num_blocks)
    }
    return tuple(
      tuple(f for f in ffns if self.num_experts and (i, f) in chosen)
      for i in range(num_blocks)
    )

  def require_some(self, owner: str, placed: Sequence[Sequence[str]]) -> None:
    """Raises ConfigError if there are experts, and no layer to have them."""
    _require(
      not self.num_experts or any(placed),
      f'{owner}.moe.where={self.where!r} chooses no feed-forward layer of its '
      f'{len(placed)} block(s)',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
  """Conformer encoder.

  Attributes:
    num_blocks: Conformer blocks L.
    model_dim: width D.
    num_heads: attention heads H; must divide `model_dim`.
    ffn_dim: hidden width M of each feed-forward layer or expert.
    subsampling: conv2d (x4), conv2d6 (x6) or conv2d8 (x8).
    subsampling_channels: channels of its convolutions; 0 means `model_dim`, as
      in the reference. Their cost goes with the square.
    position: rel_pos (absolute key positions), abs_pos, no_pos or rope_pos.
    conv_kernel: depthwise kernel width W; any if causal, odd otherwise.
    causal_conv: left-only context; streaming needs it.
    conv_norm: norm inside the convolution module.
    conv_padding_leak: reproduce the reference, whose non-causal convolution
      lets padding reach the last valid frames.
    batch_norm_padding: reproduce the reference, whose batch-norm training
      statistics include padded frames.
    activation: activation of feed-forward and convolution modules.
    macaron: a half-step feed-forward layer before attention as well.
    use_dynamic_chunk: train with random chunk sizes (U2).
    use_dynamic_left_chunk: also draw the number of left chunks.
    static_chunk_size: fixed training chunk when not dynamic; 0 for none.
    moe: the experts of the feed-forward layers; of both in every block, if
      `moe.where` does not choose.
    dropout: residual and feed-forward dropout.
    attention_dropout: dropout on attention weights.
    positional_dropout: dropout after the position encoding.
    scan_blocks: compile one block and scan it; False unrolls.
    remat: recompute block activations in the backward pass.
    remat_policy: what `remat` keeps anyway: nothing, or the results of dots,
      the dear part, so that only the cheap rest is recomputed.
  """

  num_blocks: int = 12
  model_dim: int = 256
  num_heads: int = 4
  ffn_dim: int = 2048
  subsampling: Subsampling = 'conv2d'
  subsampling_channels: int = 0
  position: Position = 'rel_pos'
  conv_kernel: int = 8
  causal_conv: bool = True
  conv_norm: ConvNorm = 'layer_norm'
  conv_padding_leak: bool = False
  batch_norm_padding: bool = False
  activation: Activation = 'swish'
  macaron: bool = True
  use_dynamic_chunk: bool = True
  use_dynamic_left_chunk: bool = False
  static_chunk_size: int = 0
  moe: MoeConfig = dataclasses.field(default_factory=MoeConfig)
  dropout: float = 0.1
  attention_dropout: float = 0.1
  positional_dropout: float = 0.1
  scan_blocks: bool = True
  remat: bool = False
  remat_policy: RematPolicy = 'nothing'

  def __post_init__(self):
    _require_choice('encoder', 'subsampling', self.subsampling, Subsampling)
    _require_choice('encoder', 'position', self.position, Position)
    _require_choice('encoder', 'conv_norm', self.conv_norm, ConvNorm)
    _require_choice('encoder', 'activation', self.activation, Activation)
    _require_choice('encoder', 'remat_policy', self.remat_policy, RematPolicy)
    _require_positive(
      'encoder',
      num_blocks=self.num_blocks,
      model_dim=self.model_dim,
      num_heads=self.num_heads,
      ffn_dim=self.ffn_dim,
      conv_kernel=self.conv_kernel,
    )
    _require(
      self.subsampling_channels >= 0,
      f'encoder.subsampling_channels={self.subsampling_channels} must not be '
      'negative',
    )
    _require_rate(
      'encoder',
      dropout=self.dropout,
      attention_dropout=self.attention_dropout,
      positional_dropout=self.positional_dropout,
    )
    _require(
      self.model_dim % self.num_heads == 0,
      f'encoder.num_heads={self.num_heads} does not divide '
      f'encoder.model_dim={self.model_dim}',
    )
    _require(
      self.position != 'rope_pos' or self.model_dim // self.num_heads % 2 == 0,
      'encoder.position=rope_pos turns pairs of channels, but a head has '
      f'{self.model_dim // self.num_heads} '
      '(encoder.model_dim / encoder.num_heads)',
    )
    # What looks to both sides needs a middle.
    _require(
      self.causal_conv or self.conv_kernel % 2 == 1,
      f'encoder.conv_kernel={self.conv_kernel} must be odd when '
      'encoder.causal_conv is false',
    )
    self.moe.require_some('encoder', self.expert_ffns)

  @property
  def expert_ffns(self) -> tuple[tuple[str, ...], ...]:
    """For each block its layers with experts, of `macaron` and `final`."""
    ffns = ('macaron', 'final') if self.macaron else ('final',)
    return self.moe.placed(self.num_blocks, ffns)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
  """Left-to-right and right-to-left Transformer decoders.

  Attributes:
    num_blocks: left-to-right layers; 0 for a CTC-only model.
    num_reverse_blocks: right-to-left layers; 0 for none.
    num_heads: attention heads.
    ffn_dim: hidden width of each feed-forward layer or expert.
    activation: activation of the feed-forward layers.
    moe: the experts of every feed-forward layer, or where `moe.where` says;
      it counts the blocks of each direction.
    dropout: residual and feed-forward dropout.
    self_attention_dropout: dropout on self-attention weights.
    cross_attention_dropout: dropout on cross-attention weights.
    positional_dropout: dropout after the position encoding.
    scan_blocks: compile one layer and scan it; False unrolls.
    remat: recompute layer activations in the backward pass.
    remat_policy: what `remat` keeps anyway: nothing or dots.
  """

  num_blocks: int = 3
  num_reverse_blocks: int = 3
  num_heads: int = 4
  ffn_dim: int = 2048
  activation: Activation = 'relu'
  moe: MoeConfig = dataclasses.field(default_factory=MoeConfig)
  dropout: float = 0.1
  self_attention_dropout: float = 0.1
  cross_attention_dropout: float = 0.1
  positional_dropout: float = 0.1
  scan_blocks: bool = True
  remat: bool = False
  remat_policy: RematPolicy = 'nothing'

  def __post_init__(self):
    _require_choice('decoder', 'activation', self.activation, Activation)
    _require_choice('decoder', 'remat_policy', self.remat_policy, RematPolicy)
    _require_positive('decoder', num_heads=self.num_heads, ffn_dim=self.ffn_dim)
    _require(self.num_blocks >= 0, 'decoder.num_blocks must not be negative')
    _require(
      self.num_reverse_blocks == 0 or self.num_blocks > 0,
      'decoder.num_reverse_blocks needs decoder.num_blocks > 0',
    )
    _require_rate(
      'decoder',
      dropout=self.dropout,
      self_attention_dropout=self.self_attention_dropout,
      cross_attention_dropout=self.cross_attention_dropout,
      positional_dropout=self.positional_dropout,
    )
    if self.num_blocks:
      self.moe.require_some('decoder', self.expert_ffns(self.num_blocks))

  def expert_ffns(self, num_blocks: int) -> tuple[tuple[str, ...], ...]:
    """For each block of a direction `('ffn',)` if it has experts, or `()`."""
    return self.moe.placed(num_blocks, ('ffn',))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  """The whole recogniser.

  Attributes:
    vocab_size: tokens V, special ones included; 0 until a tokenizer is known.
    feature_dim: mel bins F.
    blank_id: CTC blank.
    sos_id: start of sentence; -1 means the last token, V-1.
    eos_id: end of sentence; -1 means the last token, V-1.
    dtype: compute type, float32 or bfloat16; softmax, router, norms and
      losses stay in float32, and so do the stored parameters.
  """

  vocab_size: int = 0
  feature_dim: int = 80
  blank_id: int = 0
  sos_id: int = -1
  eos_id: int = -1
  dtype: Literal['float32', 'bfloat16', 'float64'] = 'float32'
  encoder: EncoderConfig = dataclasses.field(default_factory=EncoderConfig)
  decoder: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)

  def __post_init__(self):
    # float64 is for tests of exactness; JAX has it only if told so.
    _require(
      self.dtype in ('float32', 'bfloat16', 'float64'),
      f'model.dtype is {self.dtype!r}; it must be float32 or bfloat16',
    )
    _require_positive('model', feature_dim=self.feature_dim)
    _require(
      self.encoder.model_dim % self.decoder.num_heads == 0,
      f'decoder.num_heads={self.decoder.num_heads} does not divide '
      f'encoder.model_dim={self.encoder.model_dim}',
    )
    # 0 is no size yet: a config may be made before its tokenizer.
    for key in ('blank_id', 'sos_id', 'eos_id'):
      value = getattr(self, key)
      _require(
        self.vocab_size == 0 or value < self.vocab_size,
        f'model.{key}={value} is not below model.vocab_size={self.vocab_size}',
      )

  @property
  def sos(self) -> int:
    """The resolved start-of-sentence id."""
    return self.sos_id if self.sos_id >= 0 else self.vocab_size - 1

  @property
  def eos(self) -> int:
    """The resolved end-of-sentence id."""
    return self.eos_id if self.eos_id >= 0 else self.vocab_size - 1

  @property
  def expert_blocks(self) -> dict[str, tuple[int, ...]]:
    """Blocks with experts by layer, such as `encoder.final`."""
    decoder = self.decoder
    stacks = {
      'encoder': self.encoder.expert_ffns,
      'forward_decoder': decoder.expert_ffns(decoder.num_blocks),
      'backward_decoder': decoder.expert_ffns(decoder.num_reverse_blocks),
    }
    return {
      f'{stack}.{ffn}': tuple(i for i, own in enumerate(placed) if ffn in own)
      for stack, placed in stacks.items()
      for ffn in _FFNS
      if any(ffn in own for own in placed)
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class FeatureConfig:
  """Kaldi log-mel filterbank.

  Attributes:
    sample_rate: Hz; audio is resampled to it.
    num_mel_bins: mel bins F.
    frame_length_ms: window length.
    frame_shift_ms: hop.
    low_freq: lowest filter edge in Hz; the highest is the Nyquist frequency.
    dither: standard deviation of the noise added to int16-scaled samples, in
      training only.
    mel_floor: smallest mel energy before the logarithm, on the int16 scale.
      Kaldi's is float32 epsilon, and a recording never gets there; in digital
      silence (synthetic or gated speech) it lies 20 nats below any noise, and
      far from what a model trained with dither has seen; 1000 is about the
      energy of one least significant bit.
  """

  sample_rate: int = 16000
  num_mel_bins: int = 80
  frame_length_ms: float = 25.0
  frame_shift_ms: float = 10.0
  low_freq: float = 20.0
  dither: float = 1.0
  mel_floor: float = 1.1920929e-07

  def __post_init__(self):
    _require_positive(
      'features',
      sample_rate=self.sample_rate,
      num_mel_bins=self.num_mel_bins,
      frame_length_ms=self.frame_length_ms,
      frame_shift_ms=self.frame_shift_ms,
      mel_floor=self.mel_floor,
    )

  @property
  def window_samples(self) -> int:
    """Samples in one analysis window."""
    return int(self.sample_rate * self.frame_length_ms / 1000)

  @property
  def shift_samples(self) -> int:
    """Samples between the starts of neighbouring windows."""
    return int(self.sample_rate * self.frame_shift_ms / 1000)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AugmentConfig:
  """Augmentation in training; each count or probability 0 switches a kind off.

  Attributes:
    speeds: speed factors, one drawn per utterance and epoch by the batch plan.
    reverb_probability: share of the utterances that get reverberation.
    reverb: where impulse responses come from: `room` makes them, anything
      else is a manifest (JSON lines with `wav`); commas join several.
    reverb_seconds: shortest and longest reverberation time (RT60) of `room`.
    noise_probability: share of the utterances that get noise.
    noise: where noise comes from: `white`, `pink` and `brown` are made,
      `babble` is other utterances of the corpus, anything else is a manifest;
      commas join several, drawn evenly.
    noise_snr: lowest and highest signal-to-noise ratio, dB.
    volume_probability: share of the utterances whose level is changed.
    volume_db: lowest and highest gain, dB.
    num_time_masks: SpecAugment masks over time.
    max_time_mask: widest of them, frames.
    num_freq_masks: SpecAugment masks over mel bins.
    max_freq_mask: widest of them, bins.
    num_substitutions: SpecSub (U2++, section 3.2.3) substitutions.
    max_substitution: longest of them, frames.
    max_trim: SpecTrim, most tail frames dropped.
  """

  speeds: tuple[float, ...] = (0.9, 1.0, 1.1)
  reverb_probability: float = 0.0
  reverb: str = 'room'
  reverb_seconds: tuple[float, ...] = (0.1, 0.6)
  noise_probability: float = 0.0
  noise: str = 'white,pink,brown,babble'
  noise_snr: tuple[float, ...] = (5.0, 20.0)
  volume_probability: float = 0.0
  volume_db: tuple[float, ...] = (-10.0, 6.0)
  num_time_masks: int = 2
  max_time_mask: int = 50
  num_freq_masks: int = 2
  max_freq_mask: int = 10
  num_substitutions: int = 3
  max_substitution: int = 30
  max_trim: int = 0

  def __post_init__(self):
    _require_share(
      'augment',
      reverb_probability=self.reverb_probability,
      noise_probability=self.noise_probability,
      volume_probability=self.volume_probability,
    )
    _require_range(
      'augment',
      reverb_seconds=self.reverb_seconds,
      noise_snr=self.noise_snr,
      volume_db=self.volume_db,
    )
    _require_positive('augment', reverb_seconds=self.reverb_seconds[0])
    for speed in self.speeds:
      _require_positive('augment', speeds=speed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  """Where the data is and how it becomes batches.

  Attributes:
    train: manifest (JSON lines) or prepared dataset folder; commas join many,
      and `A*0.7,B*0.3` mixes them by share (`data_pipelines/mixing.py`).
    dev: the same, for choosing checkpoints.
    test: the same, for reporting.
    tokens: folder of the token table; empty means derive one from `train`.
    token_type: char, bpe or bytes, for a derived table.
    num_tokens: size of a derived BPE table, special tokens included.
    double_letters: in a derived char table, a doubled letter (the EE of THREE)
      is one token, so that CTC needs no blank inside of it.
    cmvn: CMVN statistics file; empty means compute from `train`.
    features: the filterbank.
    augment: feature augmentation, training only.
    batch_frames: frame budget of a batch; the padded batch never exceeds it.
    max_batch_size: most utterances in a batch.
    batch_sizes: utterances in a batch of each bucket by frames, short ones
      first, as `profile_buckets` finds them; empty: as many as the two keys
      above let.
    num_buckets: length buckets by frames.
    num_token_buckets: buckets by tokens within each of them; at most
      `num_buckets * num_token_buckets` shapes are compiled.
    min_seconds: shorter utterances are left out, with a reason.
    max_seconds: longer utterances are left out, with a reason.
    max_tokens: utterances with more tokens are left out, with a reason.
    min_tokens: utterances with fewer tokens are left out, with a reason.
    skip_unknown: leave out utterances with a token that the table lacks, with
      a reason; else it becomes <unk>, with a warning.
    max_skipped: largest share of the utterances that may be left out, for
      whatever reason; beyond it training stops and tells the reasons.
    plan_epochs: epochs whose batches are planned together, so that what does
      not fill a batch waits for the next epoch; 0 chooses: 1 for a corpus that
      fills every bucket many times an epoch, up to 20 for a small one.
    short_first_epochs: epochs that go from short to long utterances, which
      gets CTC past its all-blank start (Deep Speech 2, arXiv 1512.02595, 3.3).
    num_workers: threads or processes that prepare batches ahead; 0: none, a
      batch is made when it is asked for.
    worker_type: thread or process; processes cost memory and seconds to
      start, and pay where many cores are fed.
  """

  train: str = ''
  dev: str = ''
  test: str = ''
  tokens: str = ''
  token_type: Literal['char', 'bpe', 'bytes'] = 'char'
  num_tokens: int = 5000
  double_letters: bool = False
  cmvn: str = ''
  features: FeatureConfig = dataclasses.field(default_factory=FeatureConfig)
  augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
  batch_frames: int = 16000
  max_batch_size: int = 64
  batch_sizes: tuple[int, ...] = ()
  num_buckets: int = 12
  num_token_buckets: int = 1
  min_seconds: float = 0.1
  max_seconds: float = 30.0
  max_tokens: int = 400
  min_tokens: int = 1
  skip_unknown: bool = False
  max_skipped: float = 0.5
  plan_epochs: int = 0
  short_first_epochs: int = 0
  num_workers: int = 2
  worker_type: WorkerType = 'thread'

  def __post_init__(self):
    _require_choice(
      'data', 'token_type', self.token_type, Literal['char', 'bpe', 'bytes']
    )
    _require_choice('data', 'worker_type', self.worker_type, WorkerType)
    _require_positive(
      'data',
      batch_frames=self.batch_frames,
      max_batch_size=self.max_batch_size,
      num_buckets=self.num_buckets,
      num_token_buckets=self.num_token_buckets,
      num_tokens=self.num_tokens,
      max_seconds=self.max_seconds,
      max_tokens=self.max_tokens,
    )
    _require_share('data', max_skipped=self.max_skipped)
    for size in self.batch_sizes:
      _require_positive('data', batch_sizes=size)
    for key in ('plan_epochs', 'num_workers', 'min_tokens'):
      _require(getattr(self, key) >= 0, f'data.{key} must not be negative')
    _require(
      self.min_seconds < self.max_seconds,
      'data.min_seconds must be below data.max_seconds',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  """Optimizer and learning-rate schedule.

  Attributes:
    name: adamw or adam.
    learning_rate: peak rate, reached at `warmup_steps`.
    schedule: warmup_inverse_sqrt (the reference's warmuplr), cosine (to
      `final_rate_share` of the peak at `train.num_steps`) or constant.
    warmup_steps: linear warm-up; 0 for none.
    final_rate_share: where cosine ends, as a share of the peak.
    beta1: first-moment decay.
    beta2: second-moment decay.
    eps: Adam's epsilon.
    weight_decay: AdamW decay, on matrices only (not biases, norms, embeddings
      of positions).
    clip_norm: global gradient-norm clip; 0 for none.
    accumulate: batches whose gradients are averaged into one update, each
      weighed by its utterances.
    ema_decay: decay of the exponential moving average of the parameters,
      which is then what is evaluated, decoded and averaged; 0 for none.
  """

  name: Literal['adamw', 'adam'] = 'adamw'
  learning_rate: float = 1e-3
  schedule: Schedule = 'warmup_inverse_sqrt'
  warmup_steps: int = 25000
  final_rate_share: float = 0.01
  # Adam with the numbers of Vaswani et al. (1706.03762, 5.3).
  beta1: float = 0.9
  beta2: float = 0.98
  eps: float = 1e-9
  weight_decay: float = 0.01
  clip_norm: float = 5.0
  accumulate: int = 1
  ema_decay: float = 0.0

  def __post_init__(self):
    _require_choice('optimizer', 'name', self.name, Literal['adamw', 'adam'])
    _require_choice('optimizer', 'schedule', self.schedule, Schedule)
    _require_positive(
      'optimizer',
      learning_rate=self.learning_rate,
      accumulate=self.accumulate,
    )
    _require_rate(
      'optimizer',
      beta1=self.beta1,
      beta2=self.beta2,
      ema_decay=self.ema_decay,
    )
    _require_positive('optimizer', eps=self.eps)
    _require_share('optimizer', final_rate_share=self.final_rate_share)
    for key in ('warmup_steps', 'weight_decay', 'clip_norm'):
      value = getattr(self, key)
      _require(
        value >= 0, f'optimizer.{key} is {value}; it must not be negative'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  """The training loop and its objective.

  Attributes:
    seed: every random number derives from it.
    num_steps: batches in total; `optimizer.accumulate` of them make one
      update.
    ctc_weight: share of CTC in the loss; the attention decoders get the rest.
    reverse_weight: share of the right-to-left decoder in the attention loss.
    label_smoothing: mass moved off the target label.
    length_normalized: divide the attention loss by tokens, not utterances.
    balance_loss_weight: Switch load-balance loss; 0 as in U2++ MoE.
    z_loss_weight: router z-loss; 0 as in U2++ MoE.
    log_every: steps between metric lines.
    save_every: steps between checkpoints, each with a dev evaluation.
    keep_last: newest checkpoints kept.
    keep_every: steps at whose multiples a checkpoint is kept for good; 0: none.
    average_best: best checkpoints (dev WER) kept, and averaged into `model/`.
    init_from: model directory to start from; empty for random.
    trainable: parameters that train, a comma list of groups and path patterns
      (`training/parameters.py`); empty for all.
    freeze_steps: steps after which all the others train too; 0: never.
    idle_expert_steps: warn of an expert that no frame visits for so many
      steps; 0: never.
    skip_nonfinite: skip updates whose loss or gradient is not finite.
    max_nonfinite: such updates in a row that stop training; 0: any number.
  """

  seed: int = 777
  num_steps: int = 100000
  ctc_weight: float = 0.3
  reverse_weight: float = 0.3
  label_smoothing: float = 0.1
  length_normalized: bool = False
  balance_loss_weight: float = 0.0
  z_loss_weight: float = 0.0
  log_every: int = 20
  save_every: int = 1000
  keep_last: int = 2
  keep_every: int = 0
  average_best: int = 5
  init_from: str = ''
  trainable: str = ''
  freeze_steps: int = 0
  idle_expert_steps: int = 1000
  skip_nonfinite: bool = True
  max_nonfinite: int = 20

  def __post_init__(self):
    for key in ('ctc_weight', 'reverse_weight'):
      value = getattr(self, key)
      _require(
        0.0 <= value <= 1.0, f'train.{key} is {value}; it must be in [0, 1]'
      )
    _require_rate('train', label_smoothing=self.label_smoothing)
    for key in (
      'keep_every',
      'freeze_steps',
      'idle_expert_steps',
      'max_nonfinite',
      'balance_loss_weight',
      'z_loss_weight',
    ):
      value = getattr(self, key)
      _require(
        0 <= value < math.inf,
        f'train.{key} is {value}; it must not be negative',
      )
    _require_positive(
      'train',
      num_steps=self.num_steps,
      log_every=self.log_every,
      save_every=self.save_every,
      keep_last=self.keep_last,
      average_best=self.average_best,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  """Device mesh; at most one axis may be -1, which takes what is left.

  Attributes:
    data: the batch is split; parameters are replicated.
    fsdp: the batch is split; parameters and moments are split too.
    expert: experts are split.
    tensor: heads, feed-forward width and vocabulary are split.
  """

  # In the order of `sharding.axes.MESH_AXES`: a mesh takes them by their place.
  data: int = -1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1

  def __post_init__(self):
    sizes = dataclasses.astuple(self)
    _require(
      all(size == -1 or size >= 1 for size in sizes),
      f'mesh sizes must be positive or -1, not {self.to_text()}',
    )
    _require(
      sizes.count(-1) <= 1,
      f'at most one mesh axis may be -1, not {self.to_text()}',
    )

  def to_text(self) -> str:
    """The shape as `data=2 fsdp=1 expert=4 tensor=1`."""
    return ' '.join(f'{k}={v}' for k, v in dataclasses.asdict(self).items())


@dataclasses.dataclass(frozen=True, kw_only=True)
class EndpointConfig:
  """Where streams and long recordings are cut into segments; seconds.

  Attributes:
    silence_after_speech: silence that ends a segment with words in it; 0:
      never.
    long_silence: silence that ends a segment, words or none; 0: never.
    max_seconds: longest segment, whatever is heard.
    blank_threshold: a frame is silent if its CTC blank has at least this
      probability.
  """

  silence_after_speech: float = 1.0
  long_silence: float = 5.0
  max_seconds: float = 20.0
  blank_threshold: float = 0.8

  def __post_init__(self):
    owner = 'decode.endpoint'
    for key in ('silence_after_speech', 'long_silence'):
      value = getattr(self, key)
      _require(
        0.0 <= value < math.inf,
        f'{owner}.{key} is {value}; it must be seconds, or 0 for never',
      )
    _require(
      0.0 < self.max_seconds < math.inf,
      f'{owner}.max_seconds is {self.max_seconds}; it must be positive',
    )
    _require(
      0.0 < self.blank_threshold <= 1.0,
      f'{owner}.blank_threshold is {self.blank_threshold}; it must be in '
      '(0, 1]',
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeConfig:
  """Decoding.

  Attributes:
    mode: one of `DECODING_MODES`.
    chunk_size: encoder frames per chunk; -1 for full context.
    left_chunks: chunks of left context; -1 for all.
    beam: hypotheses kept, and tokens tried per frame.
    nbest: hypotheses returned.
    ctc_weight: CTC share in attention rescoring.
    reverse_weight: right-to-left share in attention rescoring.
    length_penalty: attention search divides by length ** length_penalty.
    blank_penalty: subtracted from the blank logit before the softmax.
    batch_seconds: padded audio per decoding batch.
    hotwords: file of phrases that the prefix beam search is drawn to, one a
      line, a tab and its own score behind it if wanted; empty for none.
    hotword_score: bonus per token of a hotword, a log-prob.
    whole_seconds: longer recordings are cut into segments before they are
      decoded, since the cost of one pass grows with the square of its length.
    endpoint: where streams and long recordings are cut.
  """

  mode: DecodingMode = 'attention_rescoring'
  chunk_size: int = -1
  left_chunks: int = -1
  beam: int = 10
  nbest: int = 1
  ctc_weight: float = 0.3
  reverse_weight: float = 0.5
  length_penalty: float = 0.0
  blank_penalty: float = 0.0
  batch_seconds: float = 120.0
  hotwords: str = ''
  hotword_score: float = 3.0
  whole_seconds: float = 60.0
  endpoint: EndpointConfig = dataclasses.field(default_factory=EndpointConfig)

  def __post_init__(self):
    _require_choice('decode', 'mode', self.mode, DecodingMode)
    _require(
      self.chunk_size == -1 or self.chunk_size > 0,
      f'decode.chunk_size is {self.chunk_size}; it must be positive, or -1 '
      'for full context',
    )
    _require(
      self.left_chunks >= -1,
      f'decode.left_chunks is {self.left_chunks}; it must be 0 or more, or '
      '-1 for all',
    )
    _require_positive(
      'decode',
      beam=self.beam,
      nbest=self.nbest,
      batch_seconds=self.batch_seconds,
      hotword_score=self.hotword_score,
      whole_seconds=self.whole_seconds,
    )
    _require(
      self.nbest <= self.beam,
      f'decode.nbest={self.nbest} is larger than decode.beam={self.beam}',
    )
    _require(
      0.0 <= self.reverse_weight <= 1.0,
      f'decode.reverse_weight is {self.reverse_weight}; it must be in [0, 1]',
    )
    _require(
      self.ctc_weight >= 0.0,
      f'decode.ctc_weight is {self.ctc_weight}; it must not be negative',
    )
    for key in (
      'ctc_weight',
      'length_penalty',
      'blank_penalty',
      'batch_seconds',
      'hotword_score',
      'whole_seconds',
    ):
      value = getattr(self, key)
      _require(
        math.isfinite(value), f'decode.{key} is {value}; it must be finite'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """One experiment."""

  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  decode: DecodeConfig = dataclasses.field(default_factory=DecodeConfig)


def to_dict(config: Any) -> dict[str, Any]:
  """Turns a config into plain nested dicts and lists, ready for JSON."""
  result = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      value = to_dict(value)
    result[field.name] = list(value) if isinstance(value, tuple) else value
  return result


def from_dict(cls: type[_T], tree: Mapping[str, Any], *, path: str = '') -> _T:
  """Builds a config class from nested mappings; missing keys take defaults.

  Args:
    cls: one of the config classes.
    tree: nested mappings with the class's keys.
    path: where `tree` stands, for messages.

  Returns:
    An instance of `cls`.

  Raises:
    ConfigError: for an unknown key (named, with what exists) or a value of
      the wrong type.
  """
  hints = typing.get_type_hints(cls)
  unknown = sorted(set(tree) - set(hints))
  if unknown:
    where = f'{path}.{unknown[0]}' if path else unknown[0]
    raise ConfigError(
      f'unknown config key {where!r}; {path or "the config"} has: '
      f'{", ".join(sorted(hints))}'
    )
  values = {
    key: _convert(hints[key], value, f'{path}.{key}' if path else key)
    for key, value in tree.items()
  }
  return cls(**values)


def _convert(hint: Any, value: Any, path: str) -> Any:
  """Checks one value against its annotation and converts numbers."""
  if dataclasses.is_dataclass(hint):
    if not isinstance(value, Mapping):
      raise ConfigError(f'config key {path!r} must be a group, not {value!r}')
    return from_dict(typing.cast(type, hint), value, path=path)
  origin = typing.get_origin(hint)
  # The class checks its choices itself, with a message that lists them.
  if origin is Literal:
    return value
  if origin is tuple:
    element = typing.get_args(hint)[0]
    if not isinstance(value, (list, tuple)):
      raise ConfigError(f'config key {path!r} must be a list, not {value!r}')
    return tuple(_convert(element, item, path) for item in value)
  if isinstance(hint, types.UnionType):
    return value
  # `--config.x=1` is fine for a float, but True, an int in Python, is a slip.
  if hint is float and isinstance(value, int) and not isinstance(value, bool):
    return float(value)
  if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
    raise ConfigError(
      f'config key {path!r} must be {hint.__name__}, not {value!r}'
    )
  return value


def replace(config: _T, path: str, value: Any) -> _T:
  """Returns a copy with one key, given by its dotted path, set to `value`."""
  # By way of a dict, so that every class on the path validates again.
  tree = to_dict(config)
  *groups, key = path.split('.')
  node = tree
  for group in groups:
    if not isinstance(node.get(group), dict):
      raise ConfigError(f'unknown config key {path!r}: no group {group!r}')
    node = node[group]
  node[key] = value
  return from_dict(type(config), tree)
