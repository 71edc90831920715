"""What any room may use and none is about: files of this machine's cache, the machine itself."""
