"""The same command line as a Ray job on a cluster, and the cluster's jobs.

Code and configurations travel, data never (`package`). Only `client` knows Ray.
"""

from pipeline.jobs.commands import list_jobs, show_log, show_status, stop, submit

__all__ = ["list_jobs", "show_log", "show_status", "stop", "submit"]
