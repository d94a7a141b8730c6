"""Files: written atomically, digested, locked, and the code version they come from. No torch."""
