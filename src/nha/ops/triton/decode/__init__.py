"""Decoding: 1 to 16 new tokens of each sequence in one launch."""
