"""The same command line as a Ray job on a cluster, and the cluster's jobs.

Code and configurations travel, data never (`luggage`). Only `service` and `shown` know Ray.
"""

from pipeline.jobs.commands import listing, logs, status, stop, submit

__all__ = ["listing", "logs", "status", "stop", "submit"]
