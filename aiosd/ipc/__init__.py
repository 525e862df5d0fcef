"""What aiosd's own processes exchange, and how they watch each other: messages, letters, passages, heartbeats."""
