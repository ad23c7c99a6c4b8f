"""What runs on a GPU: every part has a twin on the CPU, and where one fails at the start torch's plain way is taken."""
