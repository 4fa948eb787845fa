"""Models: one decoder for every family, configured from a Hugging Face config.json."""
