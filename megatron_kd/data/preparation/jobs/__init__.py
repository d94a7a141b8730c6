"""Run resumable jobs that turn documents into token files."""
