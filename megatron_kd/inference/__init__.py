"""Use a finished model: logits, continuations and scores. No module here trains."""
