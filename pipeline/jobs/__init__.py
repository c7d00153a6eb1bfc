"""Sends commands to a cluster as Ray jobs, and manages these jobs. Only `ray_client` imports Ray."""
