"""Name the exit codes of the training program and of the tools.

A launcher decides by these numbers whether to start a job again. `status.json` says the same in
words.
"""

from __future__ import annotations

FINISHED = 0
FAILED = 1
"""A failure that may be transient, such as the loss of another rank: restart the job."""
BAD_INPUT = 2
"""Invalid settings or damaged input: a restart fails in the same way."""
CACHE_IN_USE = 3
"""Another process writes the cache of targets."""
WRITE_FAILED = 5
"""A checkpoint or captured targets could not be written."""
REQUEUE = 85
"""The job saved its state and stopped on request: restart it to continue."""
DO_NOT_RESTART = 93
"""A non-finite number, a loss spike or the file `stop`: a person must decide what to do next."""
