"""Networks to and from files, without ever running anything that a file holds."""
