"""Process groups, shard ranges and collectives. Only `groups.py` and `platform.py` import megatron-core."""
