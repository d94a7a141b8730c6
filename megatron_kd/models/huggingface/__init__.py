"""Read and write Hugging Face model folders: config.json, tensor names and safetensors files."""
