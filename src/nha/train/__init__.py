"""Training from scratch: settings, batches, loss, optimizers, estimates and the run."""
