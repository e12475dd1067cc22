"""Distillation: a hybrid is trained to be like the model it was."""
