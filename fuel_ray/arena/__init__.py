"""Policies against each other: scenarios, tuning on training seeds, evaluation on held-out ones."""
