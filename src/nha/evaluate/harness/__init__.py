"""Tasks for lm-evaluation-harness that need no network: their YAML files and what they are made of."""
