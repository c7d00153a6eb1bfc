"""Sends commands to a cluster as Ray jobs, and manages these jobs.

Code and configurations travel, data never (`package`). Only `ray_client` imports Ray.
"""
