"""The driver's mirror of a run directory into MLflow. The files are the authority, the server a copy.

The files of a run are sent in parcels, each with a version; `tracking.json` records which version has arrived at which
server. A parcel that a server missed is sent when it answers again; sending it twice changes nothing.
"""

from pipeline.tracking.mirror import Mirror, deliver_run, describe_delivery, list_links, register_run
from pipeline.tracking.mlflow_client import check_server, find_default_uri, find_uri
from pipeline.tracking.models import PREFIX, fetch_model
from pipeline.tracking.parent import PARENT_TAG, STATE_TAG, TRIAL_TAG, ParentRun
from pipeline.tracking.run_sender import ChildRun
from pipeline.tracking.ui import serve_ui
