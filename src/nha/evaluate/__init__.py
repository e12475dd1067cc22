"""Measurements of language models, hybrid or not."""
