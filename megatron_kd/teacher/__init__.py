"""Where distillation targets come from."""
