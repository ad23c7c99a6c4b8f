"""What an operator sees of the service while it runs: logs, durations, traces."""
