"""Training on several processes by torch.distributed, started by torchrun (docs/scaling.md).

Without a process group every function here is that of one process, and costs nothing.
"""

from wcmi_fast.distributed.bounds import gathered, global_critic_stats

__all__ = ["gathered", "global_critic_stats"]
