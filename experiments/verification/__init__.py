"""Our model against stored numbers of the reference, quantity by quantity."""
