"""The driver's mirror of a run directory into MLflow. The files are the authority, the server a copy.

The files of a run are sent in parcels, each with a version; `tracking.json` records which version has arrived at which
server. A parcel that a server missed is sent when it answers again; sending it twice changes nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.tracking.mirror import Mirror, deliver_run, describe_delivery, list_links, register_run
    from pipeline.tracking.mlflow_client import check_server, find_default_uri, find_uri
    from pipeline.tracking.models import PREFIX, fetch_model
    from pipeline.tracking.parent import PARENT_TAG, STATE_TAG, TRIAL_TAG, ParentRun
    from pipeline.tracking.run_sender import ChildRun
else:

    def __getattr__(name):
        for part in ("mlflow_client", "parent", "ui", "mirror", "models", "run_sender"):
            module = import_module(f"pipeline.tracking.{part}")  # the first three need no torch
            if name == part or name in vars(module):
                return vars(module).get(name, module)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
