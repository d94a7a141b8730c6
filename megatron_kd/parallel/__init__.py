"""Provide process groups, vocabulary shards, collectives, the platform and the watchdog.

Only `groups.py` and `platform.py` import megatron-core.
"""
