"""Building blocks that know tensors only."""
