"""Jobs a user has: steer, search, load."""
