"""One file a family, each with a tuple FAMILIES."""
