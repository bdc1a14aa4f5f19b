"""Feature files: the cache's own schema, hub datasets, and the folders of other tools."""
