"""Hybrid language models: configurations, the adapter for every family, the cache."""
