"""A policy in front of a server that serves real traffic."""
