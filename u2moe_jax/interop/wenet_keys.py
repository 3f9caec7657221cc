"""Tables of WeNet's yaml keys: what they are here, and what must not differ.

Each group of the yaml has three tables: `GROUPS`, keys with a place in our
config; `FIXED`, what our model always has; `IGNORED`, what changes nothing.
"""

import dataclasses
import typing
from typing import Any

from u2moe_jax import config as config_lib


@dataclasses.dataclass(frozen=True)
class Key:
  """A yaml key with a place in our config.

  Attributes:
    ours: our key, dotted, within the config class of the group.
    default: what the reference takes where the key is missing; its type is
      the key's.
    choices: the values we have; empty for any.
  """

  ours: str
  default: Any
  choices: tuple[str, ...] = ()


ENCODER = {
  'output_size': Key('model_dim', 256),
  'attention_heads': Key('num_heads', 4),
  'linear_units': Key('ffn_dim', 2048),
  'num_blocks': Key('num_blocks', 6),
  'input_layer': Key(
    'subsampling', 'conv2d', typing.get_args(config_lib.Subsampling)
  ),
  'pos_enc_layer_type': Key(
    'position', 'rel_pos', typing.get_args(config_lib.Position)
  ),
  'cnn_module_kernel': Key('conv_kernel', 15),
  'causal': Key('causal_conv', False),
  'cnn_module_norm': Key(
    'conv_norm', 'batch_norm', typing.get_args(config_lib.ConvNorm)
  ),
  'activation_type': Key(
    'activation', 'swish', typing.get_args(config_lib.Activation)
  ),
  'macaron_style': Key('macaron', True),
  'use_dynamic_chunk': Key('use_dynamic_chunk', False),
  'use_dynamic_left_chunk': Key('use_dynamic_left_chunk', False),
  'static_chunk_size': Key('static_chunk_size', 0),
  'dropout_rate': Key('dropout', 0.1),
  'positional_dropout_rate': Key('positional_dropout', 0.1),
  'attention_dropout_rate': Key('attention_dropout', 0.0),
  'gradient_checkpointing': Key('remat', False),
}

DECODER = {
  'attention_heads': Key('num_heads', 4),
  'linear_units': Key('ffn_dim', 2048),
  'num_blocks': Key('num_blocks', 6),
  'r_num_blocks': Key('num_reverse_blocks', 0),
  'activation_type': Key(
    'activation', 'relu', typing.get_args(config_lib.Activation)
  ),
  'dropout_rate': Key('dropout', 0.1),
  'positional_dropout_rate': Key('positional_dropout', 0.1),
  'self_attention_dropout_rate': Key('self_attention_dropout', 0.0),
  'src_attention_dropout_rate': Key('cross_attention_dropout', 0.0),
  'gradient_checkpointing': Key('remat', False),
}

# Read where `mlp_type` is moe, in encoder_conf and decoder_conf.
MOE = {
  'n_expert': Key('num_experts', 8),
  'n_expert_activated': Key('top_k', 2),
}

# Of our TrainConfig: a model directory has no place for them.
MODEL = {
  'ctc_weight': Key('ctc_weight', 0.5),
  'reverse_weight': Key('reverse_weight', 0.0),
  'lsm_weight': Key('label_smoothing', 0.0),
  'length_normalized_loss': Key('length_normalized', False),
}

FBANK = {
  'num_mel_bins': Key('num_mel_bins', 23),
  'frame_length': Key('frame_length_ms', 25.0),
  'frame_shift': Key('frame_shift_ms', 10.0),
  'dither': Key('dither', 0.0),
}

RESAMPLE = {'resample_rate': Key('sample_rate', 16000)}

# The reference's filterbank has no keys for these. Said here, whatever our
# defaults become.
LOW_FREQ, MEL_FLOOR = 20.0, 1.1920929e-07

GROUPS: dict[str, dict[str, Key]] = {
  'encoder_conf': ENCODER,
  'decoder_conf': DECODER,
  'model_conf': MODEL,
  'ctc_conf': {'ctc_blank_id': Key('blank_id', 0)},
  'dataset_conf.fbank_conf': FBANK,
  'dataset_conf.resample_conf': RESAMPLE,
}

_ATTENTION_BIASES = {
  'query_bias': (True,),
  'key_bias': (True,),
  'value_bias': (True,),
}
_MLP_TYPES = ('position_wise_feed_forward', 'moe')
# What our model always has; anything else would load and compute nonsense.
# The first value is the reference's default.
FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
  'encoder_conf': {
    'normalize_before': (True,),
    'final_norm': (True,),
    'use_cnn_module': (True,),
    'layer_norm_type': ('layer_norm',),
    'norm_eps': (1e-5,),
    'conv_norm_eps': (1e-5,),
    'conv_inner_factor': (2,),
    'conv_bias': (True,),
    'mlp_bias': (True,),
    'mlp_type': _MLP_TYPES,
    'n_kv_head': (None,),
    'head_dim': (None,),
    **_ATTENTION_BIASES,
  },
  'decoder_conf': {
    'input_layer': ('embed', 'abs_pos'),
    'normalize_before': (True,),
    'src_attention': (True,),
    'use_output_layer': (True,),
    'tie_word_embedding': (False,),
    'layer_norm_type': ('layer_norm',),
    'norm_eps': (1e-5,),
    'mlp_bias': (True,),
    'mlp_type': _MLP_TYPES,
    'n_kv_head': (None,),
    'head_dim': (None,),
    **_ATTENTION_BIASES,
  },
  'model_conf': {
    'ignore_id': (-1,),
    'apply_non_blank_embedding': (False,),
  },
  'ctc_conf': {},
  'dataset_conf.fbank_conf': {'window_type': ('povey',)},
  'dataset_conf.resample_conf': {},
}

_SAME_SUMS = 'another kernel for the same sums'
IGNORED: dict[str, dict[str, str]] = {
  'encoder_conf': {
    'selfattention_layer_type': 'follows from pos_enc_layer_type; checked',
    'positionwise_conv_kernel_size': 'the reference does not read it',
    'use_sdpa': _SAME_SUMS,
    'n_expert': 'read with mlp_type moe only',
    'n_expert_activated': 'read with mlp_type moe only',
  },
  'decoder_conf': {
    'use_sdpa': _SAME_SUMS,
    'n_expert': 'read with mlp_type moe only',
    'n_expert_activated': 'read with mlp_type moe only',
  },
  'model_conf': {},
  'ctc_conf': {},
  'dataset_conf.fbank_conf': {},
  'dataset_conf.resample_conf': {},
}

# The attention that goes with each position. The reference accepts any pair,
# and computes something that we have not.
SELF_ATTENTION = {
  'rel_pos': 'rel_selfattn',
  'abs_pos': 'selfattn',
  'no_pos': 'selfattn',
  'rope_pos': 'rope_abs_selfattn',
}

# Keys of the whole yaml: the first value is the default.
KINDS = {
  'encoder': ('conformer',),
  'decoder': ('bitransformer', 'transformer', None),
  'ctc': ('ctc',),
  'model': ('asr_model', 'asrmodel'),
}
# Older yamls tell other models by these keys.
OTHER_MODELS = ('predictor', 'joint', 'paraformer')
