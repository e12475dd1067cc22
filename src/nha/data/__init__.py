"""Text that is at hand without a network, and the embedded model."""
