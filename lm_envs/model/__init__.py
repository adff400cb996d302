"""Language models: loading and checking them, tokens and chat, decoding with caches, and forwards that score."""
