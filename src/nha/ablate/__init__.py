"""Tables of models trained from scratch: models of equal size, tasks that tell them apart, a page with the outcome."""
