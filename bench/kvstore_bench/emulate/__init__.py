"""A PD-split cluster on one machine: real daemons, agents and clients, GPUs that sleep."""
