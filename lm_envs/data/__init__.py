"""Data that users bring: sources, column conventions, tokenizing, packed rows and splits."""
