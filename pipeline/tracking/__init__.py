"""The driver's mirror of a run directory into MLflow. The files are the authority, the server a copy.

What there is to deliver is cut into parcels, each with a version; `tracking.json` remembers which version arrived at
which server. What a server missed is delivered once it answers, and a parcel sent twice changes nothing.
"""

from pipeline.tracking.mirror import Mirror, deliver_run, describe_delivery, list_links, register_run
from pipeline.tracking.mlflow_client import check_server, find_default_uri, find_uri
from pipeline.tracking.models import PREFIX, fetch_model
from pipeline.tracking.parent import PARENT_TAG, STATE_TAG, TRIAL_TAG, ParentRun
from pipeline.tracking.run_sender import ChildRun
from pipeline.tracking.ui import serve_ui
