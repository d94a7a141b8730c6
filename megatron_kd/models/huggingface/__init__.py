"""Hugging Face folders: configurations of known families, safetensors files, transformers models."""
