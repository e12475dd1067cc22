"""Timing of the operator, of models, of decoding and of the CPU path."""
