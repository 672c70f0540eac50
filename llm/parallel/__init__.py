"""Everything that knows how many processes there are."""
