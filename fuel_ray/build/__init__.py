"""From settings to objects: the one place that chooses what a node is made of."""
