"""What papers report: not the library."""
