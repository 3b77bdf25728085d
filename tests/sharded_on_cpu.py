"""Runs a script with FSDP2 over gloo: only accelerate wants GPUs for it, sharding does not."""

import runpy
import sys

from accelerate import DistributedType, state

original = state.AcceleratorState.__init__


def patched(self, *args, fsdp_plugin=None, **options):
    original(self, *args, fsdp_plugin=fsdp_plugin, **options)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # every new state copies it
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


state.AcceleratorState.__init__ = patched
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
