"""Policies against each other: scenarios, tuning on tuning seeds, evaluation on held-out ones."""
