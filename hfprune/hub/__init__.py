"""What a result needs to be shared: its card."""
