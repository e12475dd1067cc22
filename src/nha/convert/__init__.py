"""From a pretrained model to a hybrid."""
