"""Process groups, vocabulary shards, collectives, platform and watchdog.

Only `groups.py` and `platform.py` import megatron-core.
"""
