"""What a run leaves on disk, and how programs meet their user."""
