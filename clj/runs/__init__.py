"""One run on disk and on its hosts: workdir, checkpoints, log, processes."""
