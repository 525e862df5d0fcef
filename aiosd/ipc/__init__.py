"""Communication between aiosd's own processes: messages, letters, passages, heartbeats."""
