"""Use of a finished model: logits, continuations, scores. Nothing here trains."""
