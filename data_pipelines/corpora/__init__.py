"""One adapter per kind of corpus; see `data_pipelines.sources`."""
