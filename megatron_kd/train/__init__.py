"""Build a run, train it step by step, and evaluate it. The loss itself is in losses/."""
