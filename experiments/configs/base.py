"""Config classes as `ConfigDict`s, so that absl flags can override keys."""

from collections.abc import Mapping
from typing import Any

import ml_collections

from u2moe_jax import config as config_lib


def config_dict(config: config_lib.Config) -> ml_collections.ConfigDict:
  """Turns a config into a locked ConfigDict with the same tree."""
  result = ml_collections.ConfigDict(_with_tuples(config_lib.to_dict(config)))
  result.lock()
  return result


def _with_tuples(tree: Mapping[str, Any]) -> dict[str, Any]:
  """Turns lists into tuples, which flags can override."""
  return {
    key: _with_tuples(value)
    if isinstance(value, Mapping)
    else tuple(value)
    if isinstance(value, list)
    else value
    for key, value in tree.items()
  }


def u2pp(
  *,
  num_blocks: int,
  model_dim: int,
  num_heads: int,
  ffn_dim: int,
  conv_kernel: int,
  num_experts: int = 0,
  decoder_blocks: int = 3,
  vocab_size: int = 0,
  dropout: float = 0.1,
  subsampling_channels: int = 0,
  scan_blocks: bool = True,
) -> config_lib.ModelConfig:
  """The U2++ recipe's model at a given size, dense or MoE in every FFN.

  Args:
    num_blocks: of the encoder.
    model_dim: of encoder and decoders.
    num_heads: everywhere.
    ffn_dim: hidden width of the feed-forward layers, and of each expert.
    conv_kernel: of the convolution modules.
    num_experts: per feed-forward layer; 0 for a dense model.
    decoder_blocks: of each decoder.
    vocab_size: 0 takes that of the token table.
    dropout: everywhere.
    subsampling_channels: see `config.EncoderConfig`.
    scan_blocks: without, a step of a small model costs a seventh less on a CPU
      (a scan copies what the backward pass needs) and compiles longer.
  """
  # Encoder and decoders have experts alike.
  moe = config_lib.MoeConfig(num_experts=num_experts)
  return config_lib.ModelConfig(
    vocab_size=vocab_size,
    encoder=config_lib.EncoderConfig(
      num_blocks=num_blocks,
      model_dim=model_dim,
      num_heads=num_heads,
      ffn_dim=ffn_dim,
      subsampling_channels=subsampling_channels,
      conv_kernel=conv_kernel,
      moe=moe,
      dropout=dropout,
      attention_dropout=dropout,
      positional_dropout=dropout,
      scan_blocks=scan_blocks,
    ),
    decoder=config_lib.DecoderConfig(
      num_blocks=decoder_blocks,
      num_reverse_blocks=decoder_blocks,
      num_heads=num_heads,
      ffn_dim=ffn_dim,
      moe=moe,
      dropout=dropout,
      self_attention_dropout=dropout,
      cross_attention_dropout=dropout,
      positional_dropout=dropout,
    ),
  )


def with_experts(
  config: ml_collections.ConfigDict, *, num_experts: int
) -> ml_collections.ConfigDict:
  """The same with experts in every FFN, each as wide as the dense FFN.

  Args:
    config: of an experiment; its model may have experts or none.
    num_experts: experts per layer; 0 makes the model dense.
  """
  for part in (config.model.encoder, config.model.decoder):
    # The ConfigDict is locked: a key that moves or is misspelt fails here.
    part.moe.num_experts = num_experts
  return config
