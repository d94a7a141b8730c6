"""Planning a run before it is paid for: memory of every rank, time of a step, online against cached, and the layouts ranked."""
