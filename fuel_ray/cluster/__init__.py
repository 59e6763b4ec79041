"""Nodes on a Ray cluster. The home of ray's actors, tasks and metrics."""
