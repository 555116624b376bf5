"""Model families, heads and decoding: what the library asks of a decoder, and the table of those it has."""
