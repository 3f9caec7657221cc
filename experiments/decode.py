r"""Decodes a manifest or dataset split and scores it.

  python -m experiments.decode --checkpoint=DIR --manifest=FILE \
    --mode=attention_rescoring --chunk_size=16 --out=FILE

A run that was stopped goes on where it was. Several processes share the work
under srun, or with --shard=0/2 and --shard=1/2, and the same --out on a disk
they all see; the last to finish writes it. All devices of a process share each
batch. The last line printed is one JSON object with the scores.
"""

import json
import os
from typing import Any

from absl import flags
from absl import logging

from data_pipelines import job_shard
from experiments.wiring import command
from experiments.wiring import decode_flags
from experiments.wiring import hosts

_CHECKPOINT = flags.DEFINE_string(
  'checkpoint',
  None,
  'Model folder, work directory, or one of its steps.',
  required=True,
)
_MANIFEST = flags.DEFINE_string(
  'manifest',
  None,
  'Manifest, prepared dataset as DIR or DIR:SPLIT, or any KIND:PATH.',
  required=True,
)
_OUT = flags.DEFINE_string(
  'out', None, 'File for the transcripts; a folder for srt and vtt.'
)
_FORMAT = flags.DEFINE_enum(
  'format',
  'jsonl',
  ['jsonl', 'txt', 'srt', 'vtt', 'ctm'],
  'Form of the transcripts.',
)
_SHARD = flags.DEFINE_string(
  'shard',
  None,
  'I/N: decode part I (0 to N-1) of the utterances. Default: what SLURM, JAX or '
  'TPU variables say of this process, else everything.',
)
_STREAMING = flags.DEFINE_bool(
  'streaming', False, 'Take the cached, chunk-by-chunk path (needs a chunk).'
)
decode_flags.define()


def _use_own_devices(host: hosts.Hosts) -> None:
  """Each process works by itself; they meet on the disk only."""
  import jax

  if not host.coordinator:
    hosts.initialize(host)  # a TPU starts with all of its hosts or not at all
  if host.local_device is not None:
    jax.config.update('jax_cuda_visible_devices', str(host.local_device))


def main(_: list[str]) -> int:
  """Decodes; exit codes in docs/exit_codes.md."""
  config = decode_flags.config()
  import jax

  from data_pipelines import sources
  from experiments.wiring import decoding
  from experiments.wiring import transcripts
  from u2moe_jax import config as config_lib
  from u2moe_jax.checkpoint import directory
  from u2moe_jax.decoding import recognizer
  from u2moe_jax.sharding import mesh as mesh_lib

  # Now, and not when hours of decoding are to be written.
  transcripts.require_format(_FORMAT.value, config.mode)
  host = None
  if _SHARD.value is not None:
    shard = job_shard.parse(_SHARD.value)
  else:
    host = hosts.from_environment(os.environ, logging.warning)
    shard = job_shard.Shard(
      *((host.process_id, host.num_processes) if host else (0, 1))
    )
  if shard.count > 1 and _OUT.value is None:
    raise transcripts.TranscriptError(
      # Without it there is no place where they could meet.
      'several processes need --out, where their parts are put together'
    )
  if host is not None:
    _use_own_devices(host)
  found = directory.find(_CHECKPOINT.value, for_decoding=True)
  decode_flags.warn(found.description, config)
  rate = found.description.features.sample_rate
  source = sources.open_source(_MANIFEST.value, split='test', sample_rate=rate)
  print(f'checkpoint: {found.choice}')
  devices, mesh = jax.local_devices(), None
  # The streaming path has one row, which cannot be split.
  if len(devices) > 1 and not _STREAMING.value:
    mesh = mesh_lib.make_mesh(config_lib.MeshConfig(data=-1), devices)
  model = recognizer.Recognizer.from_checkpoint(
    _CHECKPOINT.value, config=config, mesh=mesh
  )
  try:
    summary, decoded = decoding.run(
      model,
      source,
      streamed=_STREAMING.value,
      out=_OUT.value,
      format_name=_FORMAT.value,
      shard=shard,
      identity={
        'checkpoint': found.choice,
        # The path stays when a model is trained further; its time does not.
        'written': found.params.stat().st_mtime,
        'manifest': _MANIFEST.value,
      },
    )
  except KeyboardInterrupt:
    hint = '; run the same command to go on' if _OUT.value else ''
    print(f'stopped{hint}')
    return command.INTERRUPTED
  record: dict[str, Any] = {
    'mode': config.mode,
    'chunk_size': config.chunk_size,
  }
  # This process did not finish last, so the scores are of its part.
  if len(decoded) + summary.failed < len(source):
    record['shard'] = f'{shard.index}/{shard.count}'
  print(json.dumps(record | summary.to_json()))
  return command.OK


if __name__ == '__main__':
  command.run(main)
