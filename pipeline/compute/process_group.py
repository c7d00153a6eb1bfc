"""What Ray's controller of a training loads: no torch, whose import would take seconds before every training.

Ray's own `TorchConfig` imports it there to make the process group. Here the workers make it themselves.
"""

from ray.train import BackendConfig
from ray.train.backend import Backend


class _GroupBackend(Backend):
    share_cuda_visible_devices = True  # GPUs of one machine then reach each other directly


class GroupConfig(BackendConfig):
    backend_cls = _GroupBackend
