"""Store files: write atomically, compute digests, lock directories, record the code version."""
