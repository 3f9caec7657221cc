"""One adapter per corpus."""
