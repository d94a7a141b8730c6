"""Plan a run before paying for it: FLOPs, memory of every rank, time of a step, and the layouts."""
