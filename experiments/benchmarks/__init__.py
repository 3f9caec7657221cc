"""One file per benchmark task."""
