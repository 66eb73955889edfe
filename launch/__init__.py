"""Starting runs elsewhere: Cloud TPU VMs, GKE, Slurm, and sweeps over any of them."""
