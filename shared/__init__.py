"""What both sides of the yard agree on: jobs, errors, Redis keys and scripts. Imports nothing of ours."""

__version__ = "0.1.0"
WIRE_VERSION = 1
"""Format of a packed request (field `v`); a worker leaves newer ones queued."""
