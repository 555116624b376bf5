"""Side-by-side measurements; see README.md. Nothing imports this."""
