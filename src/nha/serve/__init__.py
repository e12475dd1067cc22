"""Serving: the plugin that runs hybrids in stock vLLM, and what `nha serve` starts."""
