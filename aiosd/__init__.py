"""aiosd: an operating system for LLM agents."""
