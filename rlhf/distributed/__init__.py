"""Where the work runs: the executor interface and the parameter server."""
