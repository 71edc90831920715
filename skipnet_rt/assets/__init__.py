"""Files that ship with the package: the digits pictures, the demo model and the log of its training."""
