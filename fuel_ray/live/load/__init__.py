"""The requests that are sent to a server."""
