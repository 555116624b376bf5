"""Data files: reading, checking, tokenising, packing."""
