"""Encoder, decoders and the whole recogniser."""
