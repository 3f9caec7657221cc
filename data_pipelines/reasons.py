"""Why an utterance is not used: every reason there is, and what it means.

`train`, `prepare_corpus` and `check_manifest` count by these names; the table
in docs/data.md is this one.
"""

from u2moe_jax.frontend import audio

# What is wrong with a list, a transcript or an archive.
_SOURCE = {
  'bad_line': 'a line of a list cannot be understood',
  'bad_encoding': 'the transcript is not UTF-8',
  'no_text': 'there is sound but no transcript',
  'no_audio': 'there is a transcript but no sound',
  'broken_tar': 'a tar file ends early or is damaged; what is before is used',
  'duplicate_key': 'an earlier utterance has the same key',
}

# What does not suit training; the limits are in `data.*` of the config.
_LIMIT = {
  'too_short': 'shorter than the limit, or than one encoder frame',
  'too_long': 'longer than the limit',
  'too_few_tokens': 'fewer tokens than the limit',
  'too_many_tokens': 'more tokens than the limit',
  'labels_do_not_fit': 'CTC needs more frames than there are, repeats counted',
  'no_duration': 'the sound can be read but its length is not known',
}

# What only training with noise meets.
_AUGMENT = {
  'bad_noise': 'the noise or impulse response drawn for it cannot be read',
}

# What only check_manifest looks for.
_CHECK = {
  'silent': 'the loudest sample is below -60 dB of full scale',
  'duplicate': 'an earlier utterance has the same sound and transcript',
  'unknown_tokens': 'characters that the token table lacks; they become <unk>',
}

REASONS = {**audio.REASONS, **_SOURCE, **_LIMIT, **_AUGMENT, **_CHECK}
