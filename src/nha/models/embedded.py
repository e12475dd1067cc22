"""The names of the model that comes with an installation, and of its distilled hybrid."""

EMBEDDED, EMBEDDED_HYBRID = "smollm2", "smollm2-hybrid"
EMBEDDED_ID, EMBEDDED_LICENSE = "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"
