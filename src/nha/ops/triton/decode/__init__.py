"""The decoding kernel: a few new tokens of running texts."""
