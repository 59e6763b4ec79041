"""A vLLM server: its process, its metrics, its batch limit."""
