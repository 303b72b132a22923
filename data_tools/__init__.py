"""Everything that writes a store or comes before one: simulate, read, check, build. Needs no torch."""
