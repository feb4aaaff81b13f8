"""What the files and config.json say; nothing here knows transformers."""
