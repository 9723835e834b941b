"""What a batch does behind an exit, and what becomes of the KV of layers that a token skipped: plug-ins by name."""
