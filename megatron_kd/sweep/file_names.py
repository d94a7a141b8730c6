"""Name the files that a sweep leaves in its folder."""

from __future__ import annotations

# The record of the whole sweep, and the version of its format.
SWEEP_FILE = "sweep.json"
FORMAT = 1
# Folder inside the folder of a task: logs, the records of its steps, and its lock.
RECORDS_FOLDER = "sweep"
